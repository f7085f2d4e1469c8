"""TorchServe's door to llama_tp: one rank of a torchrun group. Everything that knows Llama is in the library.

Local rank 0 leads: TorchServe reads its replies only, so it alone looks at requests. The other ranks follow the
leader's plans in a thread and answer with placeholders; what they are sent does not matter, and need not be the same.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

try:
    from llama_tp.serving.service import FORM, LlamaService
    from llama_tp.serving.start import start_service
except ImportError as problem:  # which TorchServe would report as a missing handler
    raise RuntimeError(f"llama_tp cannot be imported by the Python that runs torchserve: {problem}") from problem

PHRASES = {status.value: status.phrase for status in HTTPStatus}
POLL_S = 0.02  # how long handle() waits for something to say; a new request waits no longer to be seen


class LlamaHandler:
    """What TorchServe calls: initialize() once, then handle() for every batch."""

    def __init__(self) -> None:
        self.service: LlamaService | None = None  # the leader's

    def initialize(self, context: Any) -> None:
        """Load the model on all ranks, or on none. RuntimeError is the one error that TorchServe reports."""
        quieten_torchserve()
        threading.Thread(target=end_with_frontend, args=(os.getppid(),), name="frontend watch", daemon=True).start()
        self.service = start_service(
            context.model_yaml_config,
            model_dir=context.system_properties["model_dir"],
            lead=int(os.environ.get("LOCAL_RANK", "0")) == 0,
        )

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Hand over what is new, notice who has gone, return what was generated. Never raises."""
        replies = [b""] * len(data)
        if self.service is None:
            return replies
        indices = {request_id: index for index, request_id in context.request_ids.items()}
        for request_id in self.service.open_ids - indices.keys():
            self.service.close(request_id)
        known = self.service.open_ids
        for request_id, index in indices.items():
            if request_id in known:
                continue
            route = context.get_request_header(index, "url_path") or ""
            body = data[index].get("body", data[index].get("data", FORM))
            self.service.open(request_id, body, route)
        stops: list[bool | None] = [None] * len(data)
        for reply in self.service.poll(POLL_S):
            index = indices.pop(reply.request_id)
            replies[index] = reply.body
            context.set_response_status(code=reply.status, phrase=PHRASES.get(reply.status, ""), idx=index)
            context.set_response_content_type(index, reply.content_type)
            # None: a whole response. True: the end of a stream, which hangs the client unless it had a beginning.
            stops[index] = None if reply.is_first and reply.is_last else reply.is_last
        for index in indices.values():
            del context.request_ids[index]  # left out of this reply, it comes again
        context.stopping_criteria = [lambda _reply, stop=stop: stop for stop in stops]
        return replies


def end_with_frontend(agent: int) -> None:
    """When the Java frontend dies, kill the torchrun agent, and with it all ranks.

    Left alone the agent would start new ranks, which would wait half a minute for a frontend that is gone.
    """
    if not hasattr(os, "pidfd_open"):  # Linux only
        return
    frontend = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    select.select([os.pidfd_open(frontend)], [], [])
    os.kill(agent, signal.SIGKILL)


def quieten_torchserve() -> None:
    """Drop what TorchServe's worker logs at every step: a line and a metric per handle(), on every rank."""
    noise = ("skip sending response", "Backend received inference")
    logging.getLogger().addFilter(lambda record: not str(record.msg).startswith(noise))
    metrics = logging.getLogger("ts.metrics.caching_metric")
    metrics.addFilter(lambda record: "PredictionTime." not in str(record.msg))
