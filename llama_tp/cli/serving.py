"""`llama-tp serve`: one command from a model's source, or from a model store, to a server that answers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from llama_tp.cli.settings import WrongArguments

if TYPE_CHECKING:
    from llama_tp.torchserve.deployment import Deployment
    from llama_tp.torchserve.server import TorchServe

_API_KEY = "LLAMA_TP_API_KEY"
_OF_SOURCE = (
    *("tp", "device", "dtype", "compile", "quantize", "max_batch_size", "max_seq_len", "speculative_tokens"),
    *("speculative_max_batch", "api_key", "api_key_file"),
    *("served_model_name", "chat_template", "tokenizer"),
)
"""Options that a model store has in its model-config.yaml."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `llama-tp serve`, which explains them."""

    source: str | None
    tp: int | str | None
    port: int | None
    host: str | None
    device: str | None
    dtype: str | None
    compile: bool | str | None
    quantize: str | None
    max_batch_size: int | None
    max_seq_len: int | None
    speculative_tokens: int | None
    speculative_max_batch: int | None
    api_key: str | None
    api_key_file: str | None
    served_model_name: str | None
    chat_template: str | None
    tokenizer: str | None
    drain_timeout: float
    detach: bool
    foreground: bool
    model_name: str
    model_store: str | None
    run_dir: str | None
    properties: str | None
    log_config: str | None
    timeout_s: float
    config: str | None

    def __post_init__(self) -> None:
        """WrongArguments if they contradict each other, or cannot be."""
        if self.timeout_s <= 0:
            raise WrongArguments(f"timeout_s={self.timeout_s!r} must be a number of seconds above 0")
        if not 0 <= self.drain_timeout < float("inf"):
            raise WrongArguments(f"drain_timeout={self.drain_timeout!r} must be a number of seconds, at least 0")
        if self.source is not None and self.model_store is not None:
            raise WrongArguments(f"serve either {self.source} or --model-store {self.model_store}")
        if self.detach and (self.foreground or self.source is None):
            raise WrongArguments("--detach is for serving a SOURCE in the background, and contradicts --foreground")
        if self.source is None and (given := [name for name in _OF_SOURCE if getattr(self, name) is not None]):
            raise WrongArguments(
                f"--{given[0].replace('_', '-')} needs a SOURCE: a model store has its own model-config.yaml; give "
                "`llama-tp serve` a checkpoint or a model's folder, or change that file"
            )
        if self.api_key is not None and self.api_key_file is not None:
            raise WrongArguments("both --api-key and --api-key-file are given; leave one of them out")

    @property
    def stays(self) -> bool:
        """Whether the command runs as long as the server."""
        return self.foreground or (self.source is not None and not self.detach)


def start_and_stay(options: Options) -> None:
    """Start TorchServe; return once the model is ready, or, in the foreground, never: it ends with the server.
    ValueError or OSError, in one line, if it does not start."""
    _hide_api_key(options.api_key)
    server = _server(options)
    started = monotonic()
    if options.source is not None:
        server.check_host()
        _deploy(options, server)
    if not options.stays:
        _start(server, options)
        _say_ready(server, options, monotonic() - started)
        return
    from llama_tp.torchserve.foreground import end, run_until_ended, watched

    with watched(server):
        try:
            _start(server, options)
            _say_ready(server, options, monotonic() - started)
            run_until_ended(server, options.drain_timeout)
        finally:
            end(server)


def _server(options: Options) -> TorchServe:
    from llama_tp.resources import LOG_CONFIG, PROPERTIES, resource
    from llama_tp.torchserve.properties import Properties
    from llama_tp.torchserve.server import TorchServe
    from llama_tp.user_cache import cache_folder

    properties = options.properties or resource(PROPERTIES)
    run_dir = options.run_dir
    if run_dir is None and options.source is None:
        run_dir = "."
    elif run_dir is None:
        port = Properties.read(properties).listeners(options.host, options.port).inference.port
        run_dir = str(cache_folder() / "run" / str(port))
    store = options.model_store or ("model_store" if options.source is None else Path(run_dir, "archive"))
    return TorchServe(
        model_store=store,
        model_name=options.model_name,
        run_dir=run_dir,
        host=options.host,
        port=options.port,
        properties=properties,
        log_config=options.log_config or resource(LOG_CONFIG),
    )


def _deploy(options: Options, server: TorchServe) -> None:
    from llama_tp.torchserve.api_key import store_api_key
    from llama_tp.torchserve.deployment import deploy

    key_file = store_api_key(server.run_dir, key=options.api_key, file=options.api_key_file)
    deploy(_deployment(options, None if key_file is None else str(key_file)), server.model_store)


def _deployment(options: Options, api_key_file: str | None) -> Deployment:
    from llama_tp.torchserve.deployment import AUTO, Deployment

    assert options.source is not None
    return Deployment(
        source=options.source,
        model_name=options.model_name,
        served_model_name=options.served_model_name,
        tp=options.tp,
        device=options.device or AUTO,
        dtype=options.dtype or AUTO,
        compile=AUTO if options.compile is None else options.compile,
        quantize=options.quantize,
        max_batch_size=options.max_batch_size,
        max_seq_len=options.max_seq_len,
        speculative_tokens=options.speculative_tokens,
        speculative_max_batch=options.speculative_max_batch,
        tokenizer=options.tokenizer,
        chat_template=options.chat_template,
        api_key_file=api_key_file,
    )


def _start(server: TorchServe, options: Options) -> None:
    server.start()
    try:
        server.wait_until_ready(options.timeout_s)
    except BaseException:
        if not options.stays:
            server.stop()
        raise


def _say_ready(server: TorchServe, options: Options, seconds: float) -> None:
    if server.is_open:
        print(f"tokens are off: whoever reaches {server.listeners.inference} can use the model", file=sys.stderr)
    if options.source is None:
        print(f"{options.model_name} is ready at {server.url}; logs are in {server.log_dir}", flush=True)
        return
    from llama_tp.torchserve.welcome import welcome

    print(f"{options.model_name} is ready after {seconds:.1f} s\n\n{welcome(server, stays=options.stays)}", flush=True)


def _hide_api_key(key: str | None) -> None:
    """Other users of the machine see the command line of this process, but not its environment. So a key that was typed
    goes there, and this process starts anew."""
    os.environ.pop(_API_KEY, None)  # the server's processes need not know it
    words = list(sys.argv[1:])
    kept = _without_option(words, "api-key")
    if key is not None and kept != words:
        command = [sys.executable, "-m", "llama_tp", *kept]
        os.execve(sys.executable, command, {**os.environ, _API_KEY: key})


def _without_option(words: list[str], name: str) -> list[str]:
    """A command line without an option, however it is written."""
    kept: list[str] = []
    is_value = False
    for word in words:
        option, equals, _ = word.partition("=")
        if option.startswith("--") and option[2:].replace("_", "-") == name:
            is_value = not equals
        elif is_value:
            is_value = False
        else:
            kept.append(word)
    return kept
