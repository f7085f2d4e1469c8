"""What to do with a server that is ready."""

from __future__ import annotations

import shlex
from pathlib import Path

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
        "try it": _curl(base, server.token_file, key_file, can_chat=server.can_chat),
        "token": f"'inference' in {server.token_file}" if server.token_file else "",
        "API key": f"in {key_file}" if key_file else "",
        "metrics": f"{metrics.scheme}://{metrics.local_host}:{metrics.port}/metrics",
        "logs": str(server.log_dir),
        "stop": "Ctrl-C" if stays else f"llama-tp stop --port {server.port}",
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in lines.items() if text) + "\n"


def _curl(base: str, token_file: Path | None, key_file: Path | None, *, can_chat: bool) -> str:
    """Secrets are read from their files."""
    authorization = ""
    if token_file is not None:
        read = "import json, sys; print(json.load(open(sys.argv[1]))['inference']['key'])"
        token = f"$(python3 -c {shlex.quote(read)} {shlex.quote(str(token_file))})"
        authorization += f' -H "Authorization: Bearer {token}"'
    if key_file is not None:
        header = "Authorization: Bearer" if token_file is None else "x-api-key:"
        authorization += f' -H "{header} $(cat {shlex.quote(str(key_file))})"'
    route, body = ("chat/completions", _CHAT) if can_chat else ("completions", _COMPLETION)
    return f"curl -s {base}/v1/{route}{authorization} -H 'Content-Type: application/json' -d '{body}'"
