"""What to do with a server that is ready."""

from __future__ import annotations

import shlex

from llama_tp.torchserve.server import TorchServe

_VERSION = "1.0"
_CHAT = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
_COMPLETION = '{"prompt": "The capital of France is", "temperature": 0}'


def welcome(server: TorchServe, *, stays: bool) -> str:
    """Its addresses, and a command to paste. `stays`: whether Ctrl-C will stop it."""
    base = f"{server.url}/{_VERSION}"
    metrics, key_file = server.listeners.metrics, server.api_key_file
    lines = {
        "base URL": f"{base}/v1 (OpenAI's API; model {server.served_name!r})",
        "chat page": f"{base}/chat" if server.can_chat else "",
        "try it": _curl(base, str(key_file) if key_file else None, can_chat=server.can_chat),
        "API key": f"in {key_file}" if key_file else "",
        "metrics": f"{metrics.scheme}://{metrics.local_host}:{metrics.port}/metrics",
        "logs": str(server.log_dir),
        "stop": "Ctrl-C" if stays else f"llama-tp stop --port {server.port}",
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in lines.items() if text) + "\n"


def _curl(base: str, key_file: str | None, *, can_chat: bool) -> str:
    authorization = "" if key_file is None else f' -H "Authorization: Bearer $(cat {shlex.quote(key_file)})"'
    route, body = ("chat/completions", _CHAT) if can_chat else ("completions", _COMPLETION)
    return f"curl -s {base}/v1/{route}{authorization} -H 'Content-Type: application/json' -d '{body}'"
