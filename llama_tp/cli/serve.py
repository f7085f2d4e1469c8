"""Commands for TorchServe."""

from __future__ import annotations

import logging
import sys
from dataclasses import fields
from time import monotonic, sleep

from llama_tp.cli.command import allow_slow_shutdown
from llama_tp.cli.serving import Options, start_and_stay
from llama_tp.cli.settings import WrongArguments, configurable, warn_of_unknown_variables

_LONG_WAIT_S = 1200.0


def config(name: str | None = None) -> None:
    """Print a configuration that comes with llama-tp, as a starting point. Without a name, list them.

    Args:
        name: file name, such as llama2-7b.yaml (for `package`) or config.production.properties (for `serve`)
    """
    from llama_tp.resources import configurations, resource

    names = configurations()
    if name is None:
        print("\n".join(names))
    elif name in names:
        sys.stdout.write(resource(f"configs/{name}").read_text(encoding="utf-8"))
    else:
        raise ValueError(f"name={name!r} is not a configuration of llama-tp; choose one of {', '.join(names)}")


def package(
    config: str,
    checkpoint: str,
    tokenizer: str | None = None,
    model_store: str = "model_store",
    model_name: str = "llama",
    handler: str | None = None,
    overwrite: bool = False,
) -> None:
    """Build the folder in the model store that TorchServe serves, with torch-model-archiver.

    Args:
        config: the model-config.yaml to serve with; `llama-tp config` prints starting points
        checkpoint: a converted checkpoint
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the checkpoint's
        model_store: TorchServe's model store
        model_name: the model's name in URLs
        handler: the handler file; by default llama-tp's own
        overwrite: replace the folder even if it contains another checkpoint, which is then deleted
    """
    from llama_tp.resources import HANDLER, resource
    from llama_tp.torchserve.archive import build_archive

    folder = build_archive(
        model_name=model_name,
        config_file=config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        handler=handler or resource(HANDLER),
        model_store=model_store,
        overwrite=overwrite,
    )
    print(folder)


@configurable()
def serve(
    source: str | None = None,
    *,
    tp: int | str | None = None,
    port: int | None = None,
    host: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool | str | None = None,
    quantize: str | None = None,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    speculative_tokens: int | None = None,
    speculative_max_batch: int | None = None,
    api_key: str | None = None,
    api_key_file: str | None = None,
    served_model_name: str | None = None,
    chat_template: str | None = None,
    tokenizer: str | None = None,
    drain_timeout: float = 30.0,
    detach: bool = False,
    foreground: bool = False,
    model_name: str = "llama",
    model_store: str | None = None,
    run_dir: str | None = None,
    properties: str | None = None,
    log_config: str | None = None,
    timeout_s: float = 1200.0,
    config: str | None = None,
) -> None:
    """Serve a model with TorchServe: `llama-tp serve SOURCE` does all that is needed, and runs until Ctrl-C.

    SOURCE is converted if necessary, once, into a cache (see `llama-tp cache`). The command returns or prints URLs once
    the model has generated a token, then prints a line for each request. Ctrl-C or SIGTERM lets open requests finish.

    Without SOURCE, TorchServe serves a model store that `llama-tp package` has made, in the background: the options tp,
    device, dtype, compile, quantize, max_batch_size, max_seq_len, speculative_tokens, speculative_max_batch, api_key,
    api_key_file, served_model_name, chat_template and tokenizer are then those of its model-config.yaml.

    Every option is also read from a variable, such as LLAMA_TP_MAX_SEQ_LEN, and from the YAML file --config. The
    command line wins over variables, variables win over the file, and the file wins over the defaults.

    Args:
        source: a converted checkpoint; what `llama-tp convert` reads, such as the folder of a Hugging Face model or a
            GGUF file; or a repository of the Hugging Face hub, owner/name or owner/name@revision
        tp: number of ranks, or auto: one per GPU, one on CPUs. By default auto
        port: port of the inference API; by default from the properties' inference_address, else 8080. Management and
            metrics use the next two on 127.0.0.1, unless the properties say otherwise
        host: listening address of the inference API, 0.0.0.0 for all interfaces; by default from the properties'
            inference_address, else 127.0.0.1
        device: auto, cpu or cuda; by default auto: GPUs, if there are any
        dtype: auto, bfloat16, float16 or float32; by default auto: the checkpoint's, or what is faster here
        compile: auto, true or false: whether kernels compiled on this machine compute; by default auto: on
            CPUs, as soon as they are compiled, if there is a C++ compiler
        quantize: int8 or int4, to quantize the linear layers; none, to make all layers dense; by default as in the
            source
        max_batch_size: requests at the same time; by default the checkpoint's, or fewer if memory is short
        max_seq_len: prompt plus answer of a request, in tokens; by default the checkpoint's (2048 after a conversion)
        speculative_tokens: tokens per step to predict from a request's text so far, such as 4; faster for texts that
            repeat; by default 0
        speculative_max_batch: predict none while more answers than this are generated; by default 2
        api_key: key that requests must have, in Authorization: Bearer KEY or x-api-key. The environment and
            api_key_file hide it better
        api_key_file: file with that key
        served_model_name: the model's name in requests, answers and v1/models; by default the name of the repository on
            the hub, else model_name
        chat_template: file with a Jinja chat template to use instead of the model's own
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the source's
        drain_timeout: seconds that open requests have to finish at the end, in the foreground; 0 cuts them off
        detach: serve SOURCE in the background, and return once it is ready
        foreground: without SOURCE: keep running until the server exits, print the ranks' logs, and stop the server on
            SIGTERM or Ctrl-C; for containers and systemd
        model_name: the model's name in URLs
        model_store: without SOURCE: TorchServe's model store; by default model_store
        run_dir: folder for logs/ and, if tokens are on, key_file.json; by default a folder of the cache for this port,
            and without SOURCE the current folder
        properties: TorchServe's config.properties; by default loopback only, without tokens
        log_config: TorchServe's log4j2.xml; by default one that does not log every token
        timeout_s: seconds to wait for the model to be ready
        config: YAML file with any of these options, such as `port: 8080`
    """
    options = Options(**locals())
    warn_of_unknown_variables(field.name for field in fields(options))
    allow_slow_shutdown()
    start_and_stay(options)


@configurable("port", "drain_timeout")
def stop(*, port: int = 8080, drain_timeout: float = 0.0) -> None:
    """Stop the TorchServe that `llama-tp serve` started on this port, and all its ranks.

    Args:
        port: port of its inference API; by default that in LLAMA_TP_PORT, else 8080
        drain_timeout: seconds that open requests have to finish; meanwhile, new ones are refused. By default those in
            LLAMA_TP_DRAIN_TIMEOUT, else 0: they are cut off
    """
    from llama_tp.torchserve.properties import valid_port
    from llama_tp.torchserve.server import stop_server

    valid_port(port, f"--port {port}")
    is_stopped = stop_server(port, drain_timeout)
    print("stopped" if is_stopped else f"no server started by llama-tp is running on port {port}")


@configurable("port", "model_name")
def health(*, port: int = 8080, model_name: str = "llama", timeout_s: float = 30.0, wait: float | bool = 0.0) -> None:
    """Generate one token on this host's server. Exit code 0 if that works, 1 if not, 2 for wrong arguments.

    Finds the server, however it was started, and its access tokens, which it renews if they have expired, and its API
    key. A server that is too busy for the request, but with ready ranks, is healthy.

    Args:
        port: port of the inference API; by default that in LLAMA_TP_PORT, else 8080
        model_name: the model's name in URLs; by default that in LLAMA_TP_MODEL_NAME, else llama
        timeout_s: seconds to wait for the token
        wait: seconds to keep trying, for example after `torchserve --start`; without a number 1200
    """
    from llama_tp.torchserve.properties import valid_port
    from llama_tp.torchserve.server import why_unhealthy

    try:
        valid_port(port, f"--port {port}")
    except OSError as error:
        raise WrongArguments(str(error)) from None
    deadline = monotonic() + (_LONG_WAIT_S if wait is True else wait)
    while (problem := why_unhealthy(model_name, port, timeout_s)) and monotonic() < deadline:
        sleep(0.5)
    if problem:
        raise OSError(f"not healthy: {problem}")
    print(f"{model_name} on port {port} is healthy")


def follow(config: str, model_dir: str | None = None) -> None:
    """Compute this host's share of a model that TorchServe serves on another host. Runs under torchrun.

    Args:
        config: the same model-config.yaml as on the serving host, with torchrun.nnodes and torchrun.rdzv-endpoint set
        model_dir: base folder of relative paths in the configuration; by default its own folder
    """
    from llama_tp.torchserve.follower import follow_leader

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    follow_leader(config, model_dir)
