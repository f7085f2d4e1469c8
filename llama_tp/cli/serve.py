"""Commands for TorchServe."""

from __future__ import annotations

import logging
import sys
from time import monotonic, sleep

from llama_tp.cli.command import allow_slow_shutdown


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


def serve(
    model_store: str = "model_store",
    model_name: str = "llama",
    host: str | None = None,
    port: int | None = None,
    run_dir: str = ".",
    properties: str | None = None,
    log_config: str | None = None,
    timeout_s: float = 1200.0,
    foreground: bool = False,
) -> None:
    """Start TorchServe in the background and return once the model has generated a token.

    Args:
        model_store: TorchServe's model store
        model_name: the model to serve
        host: listening address of the inference API, 0.0.0.0 for all interfaces; by default from the properties'
            inference_address, else 127.0.0.1
        port: port of the inference API; by default from the properties' inference_address, else 8080. Management and
            metrics use the next two on 127.0.0.1, unless the properties say otherwise
        run_dir: folder for logs/ and, if tokens are on, key_file.json
        properties: TorchServe's config.properties; by default loopback only, without tokens
        log_config: TorchServe's log4j2.xml; by default one that does not log every token
        timeout_s: seconds to wait for the model to be ready
        foreground: keep running until the server exits, print the ranks' logs, and stop the server on SIGTERM or
            Ctrl-C; for containers and systemd
    """
    from llama_tp.resources import LOG_CONFIG, PROPERTIES, resource
    from llama_tp.torchserve.server import TorchServe

    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s!r} must be a number of seconds above 0")
    if not isinstance(foreground, bool):
        raise ValueError(f"foreground={foreground!r} must be True or False, or have no value")
    server = TorchServe(
        model_store=model_store,
        model_name=model_name,
        run_dir=run_dir,
        host=host,
        port=port,
        properties=properties or resource(PROPERTIES),
        log_config=log_config or resource(LOG_CONFIG),
    )
    allow_slow_shutdown()
    server.start()
    try:
        server.wait_until_ready(timeout_s)
        if server.is_open:
            print(f"tokens are off: whoever reaches {server.listeners.inference} can use the model", file=sys.stderr)
        print(f"{model_name} is ready at {server.url}; logs are in {server.log_dir}", flush=True)
        if foreground:
            server.wait_until_ended()
    except BaseException:
        server.stop()
        raise


def stop(port: int = 8080) -> None:
    """Stop the TorchServe that `llama-tp serve` started on this port, and all its ranks.

    Args:
        port: port of its inference API
    """
    from llama_tp.torchserve.properties import valid_port
    from llama_tp.torchserve.server import stop_server

    valid_port(port, f"--port {port}")
    print("stopped" if stop_server(port) else f"no server started by llama-tp is running on port {port}")


def health(port: int = 8080, model_name: str = "llama", timeout_s: float = 30.0, wait: float = 0.0) -> None:
    """Generate one token on this host's server. Exit code 0 if that works, 1 if not, 2 for wrong arguments.

    Finds the server, however it was started, and its access tokens, which it renews if they have expired. A server that
    is too busy for the request, but with ready ranks, is healthy.

    Args:
        port: port of the inference API
        model_name: the model's name in URLs
        timeout_s: seconds to wait for the token
        wait: seconds to keep trying, for example after `torchserve --start`
    """
    from llama_tp.torchserve.properties import valid_port
    from llama_tp.torchserve.server import why_unhealthy

    try:
        valid_port(port, f"--port {port}")
        for name, seconds in (("timeout_s", timeout_s), ("wait", wait)):
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
                raise ValueError(f"--{name} {seconds}: must be a number of seconds")
    except (OSError, ValueError) as error:
        print(f"llama-tp: {error}", file=sys.stderr)
        sys.exit(2)
    deadline = monotonic() + wait
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
