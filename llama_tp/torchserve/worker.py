"""From a model-config.yaml to a running service: on every rank of the group, or on none."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from llama_tp.config import EngineConfig
from llama_tp.config_error import ConfigError
from llama_tp.engine.engine import Engine
from llama_tp.engine.loop import EngineLoop, EngineThread
from llama_tp.engine.startup import load_engine
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.agreement import agree, gather, is_permanent, one_line
from llama_tp.parallel.launch import join, meet
from llama_tp.serving.access import Access, read_key
from llama_tp.serving.service import LlamaService
from llama_tp.text.chat import ChatFormat, chat_format
from llama_tp.text.tokenizer import Tokenizer, load_tokenizer
from llama_tp.text.tools.choose import Tools, choose_tools
from llama_tp.torchserve.config import ModelConfig
from llama_tp.torchserve.drain import drain_on_demand
from llama_tp.torchserve.failure_marker import FailureMarker
from llama_tp.torchserve.published_sampling import published_sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """What each rank of the group has once all of them have loaded."""

    engine: Engine
    thread: EngineThread
    """Where the engine was loaded and must run."""
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatFormat | str
    """The chat format, or why there is none."""
    access: Access | None = None
    """Who may send requests; None: everybody. Only the leader knows."""


def start_service(
    yaml_config: object, *, model_name: str, model_version: str, model_dir: str, lead: bool
) -> LlamaService | None:
    """Join the group, load this rank's share and start computing. The service on the leader, None on followers.

    RuntimeError with the same text on every rank if any of them failed; it has been logged.
    """
    rank = load_rank(lambda: yaml_config, Path(model_dir), lead=lead)
    if not lead:
        rank.thread.run(rank.engine.follow)
        return None
    sys.setswitchinterval(0.0005)  # the engine thread often waits in Python; the server's thread should not wait for it
    loop = EngineLoop(rank.engine, abandon_after_s=rank.config.handler.abandon_after_s, thread=rank.thread)
    loop.start()
    published = published_sampling(Path(model_dir) / rank.config.handler.tokenizer_path)
    defaults = rank.config.request_defaults(published)
    service = LlamaService(
        loop,
        rank.tokenizer,
        rank.chat,
        defaults,
        model_name=model_name,
        model_version=model_version,
        tools=_tools_or_why_not(rank),
        served_name=rank.config.handler.served_model_name,
        access=rank.access,
    )
    drain_on_demand(service)
    return service


def _tools_or_why_not(rank: LoadedRank) -> Tools | str:
    if isinstance(rank.chat, str):
        return rank.chat
    tools = choose_tools(rank.config.handler.tool_format, rank.chat, rank.tokenizer)
    log.info("tool format: %s", f"none: {tools}" if isinstance(tools, str) else f"{tools.format.name} ({tools.origin})")
    return tools


def load_rank(read_yaml: Callable[[], object], model_dir: Path, *, lead: bool) -> LoadedRank:
    """Join the group and load this rank's share of the model that the configuration describes.

    RuntimeError with the same text on every rank if any of them failed, reading the configuration included; it has
    been logged.
    """
    try:
        return _load_rank(read_yaml, model_dir, lead)
    except Exception as error:
        reason = one_line(error)
        log.error("the model was not loaded: %s", reason)
        raise RuntimeError(reason) from error


def _load_rank(read_yaml: Callable[[], object], model_dir: Path, lead: bool) -> LoadedRank:
    meet()
    start = monotonic()
    yaml_config = agree(read_yaml)
    marker = agree(lambda: FailureMarker(yaml_config, model_dir))
    _refuse_again(marker, start)
    with _remembering(marker):
        config, args, engine_config, tokenizer, chat = agree(lambda: _read(yaml_config, model_dir))
    access = agree(lambda: _access(config, model_dir) if lead else None)
    group = join(
        engine_config.device,
        timeout_s=engine_config.collective_timeout_s,
        lead=lead,
        deterministic=engine_config.deterministic,
    )
    if lead:
        log.info("chat format: %s", f"none: {chat}" if isinstance(chat, str) else f"{chat.name} ({chat.origin})")
    folder = str(model_dir / config.handler.converted_ckpt_dir)
    thread = EngineThread()
    with _remembering(marker):
        engine = agree(lambda: thread.call(lambda: load_engine(folder, args, engine_config, group)))
    marker.forget()
    return LoadedRank(engine, thread, config, tokenizer, chat, access)


def _refuse_again(marker: FailureMarker, start: float) -> None:
    """ValueError if every rank remembers that this model cannot be loaded. If the files of one host have changed, all
    hosts try again."""
    known = gather(marker.recall())
    if None in known:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.info(
            "not reading the model again: in %.2f s, nothing was found to have changed since the last attempt; "
            "to read it all the same, remove %s",
            monotonic() - start,
            marker.path,
        )
    raise ValueError(f"{known[0]} (as before; nothing has changed since)")


@contextmanager
def _remembering(marker: FailureMarker) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_permanent(error):
            marker.remember(one_line(error))
        raise


def _read(
    yaml_config: object, model_dir: Path
) -> tuple[ModelConfig, ModelArgs, EngineConfig, Tokenizer, ChatFormat | str]:
    """Everything that can be checked before a device is touched. ValueError lists every problem."""
    problems = _missing_files(yaml_config, model_dir)
    try:
        config = ModelConfig.of(yaml_config)
    except ConfigError as error:
        raise ConfigError(error.problems + problems) from None
    problems += _wrong_number_of_hosts(config)
    if problems:
        raise ConfigError(problems)
    handler = config.handler
    folder = model_dir / handler.converted_ckpt_dir
    args = ModelArgs.load_converted(
        model_dir / handler.model_args_path if handler.model_args_path else folder / "model_args.json"
    )
    engine_config = config.engine_config(args)
    try:
        tokenizer = load_tokenizer(model_dir / handler.tokenizer_path, embedding_rows=args.vocab_size)
    except ValueError as error:
        raise ConfigError([f"handler.tokenizer_path: {error}"]) from None
    return config, args, engine_config, tokenizer, _chat_or_why_not(config, tokenizer)


def _access(config: ModelConfig, model_dir: Path) -> Access | None:
    """Read again after every restart of the ranks."""
    path = config.handler.api_key_file
    try:
        return None if path is None else Access(read_key(model_dir / path))
    except ValueError as error:
        raise ConfigError([f"handler.{error}"]) from None


def _wrong_number_of_hosts(config: ModelConfig) -> list[str]:
    """Every host has its own model-config.yaml, and they may differ."""
    here, wanted = os.environ.get("GROUP_WORLD_SIZE"), config.torchrun.nnodes
    if here is None or int(here) == wanted:
        return []
    return [f"torchrun.nnodes={wanted}, but torchrun started this group on {here} hosts; make them agree"]


def _missing_files(yaml_config: object, model_dir: Path) -> list[str]:
    """Reported together with all other problems, so the configuration may be malformed."""
    handler = yaml_config.get("handler") if isinstance(yaml_config, dict) else None
    paths = {key: handler.get(key) for key in _PATHS} if isinstance(handler, dict) else {}
    return [
        f"handler.{key}: there is no {model_dir / path}"
        for key, path in paths.items()
        if isinstance(path, str) and not (model_dir / path).exists()
    ]


_PATHS = ("converted_ckpt_dir", "tokenizer_path", "model_args_path")


def _chat_or_why_not(config: ModelConfig, tokenizer: Tokenizer) -> ChatFormat | str:
    """A model without a chat format still completes text; a format chosen by name must fit."""
    try:
        return chat_format(config.handler.chat_format, tokenizer)
    except ValueError as error:
        if config.handler.chat_format == "auto" and config.handler.mode != "chat":
            return str(error)
        raise
