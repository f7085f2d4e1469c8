"""One log line for each request when it ends: numbers and known words only, no text of a user.

request 5d0c… v1/chat/completions 200 stop: 37 tokens in, 7 out, TTFT 0.071 s, 36.2 tokens/s, total 0.240 s
request 81f2… v1/completions 400 invalid_json
"""

from __future__ import annotations

import logging

from llama_tp.serving.generation import Usage
from llama_tp.serving.metrics import RequestRecord

NATIVE = "predictions"
"""How the native route, which has no name, is logged."""
UNKNOWN = "unknown"
"""Instead of the name of a route that does not exist, which a client made up."""
CLIENT_GONE = 499
"""Status of a request whose client has disconnected, as in nginx's logs."""
PREFIX = "request "

log = logging.getLogger(__name__)


def log_short(request_id: str, route: str, status: int, outcome: str) -> None:
    """Log a request that was answered without the engine. `outcome`: an error's code, or another known word."""
    log.info("request %s %s %d %s", request_id, route or NATIVE, status, outcome)


def log_ended(request_id: str, route: str, status: int, outcome: str, usage: Usage, record: RequestRecord) -> None:
    """Log a request of the engine. The rate is that of all its outputs together, from the first token on."""
    end, first = record.now(), record.first_token
    speed = ""
    if first is not None:
        speed = f", TTFT {first - record.opened:.3f} s"
        if usage.completion_tokens > 1 and end > first:
            speed += f", {(usage.completion_tokens - 1) / (end - first):.1f} tokens/s"
    log.info(
        "request %s %s %d %s: %d tokens in, %d out%s, total %.3f s",
        request_id,
        route or NATIVE,
        status,
        outcome,
        usage.prompt_tokens,
        usage.completion_tokens,
        speed,
        end - record.opened,
    )
