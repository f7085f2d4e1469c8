"""TorchServe's entry point to llama_tp: one rank of a torchrun group. All Llama code is in the library.

Local rank 0 leads: TorchServe reads only its replies, so only it looks at requests. The other ranks follow the leader's
plans in a thread and reply with placeholders; they ignore the requests they get, which may differ.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any

try:
    from llama_tp.serving.access import credentials_in
    from llama_tp.serving.errors import ApiError
    from llama_tp.serving.reply import Reply
    from llama_tp.serving.service import LlamaService
    from llama_tp.torchserve.frontend import Batch, Exchange, Transport, body_in
    from llama_tp.torchserve.metrics import start_publishing
    from llama_tp.torchserve.worker import start_service
except ImportError as problem:  # TorchServe would report an ImportError as a missing handler
    raise RuntimeError(f"llama_tp cannot be imported by the Python that runs torchserve: {problem}") from problem

log = logging.getLogger(__name__)

POLL_S = 0.02  # how long handle() waits for output, and so the longest that a new request goes unseen


class LlamaHandler:
    """What TorchServe calls: initialize() once, then handle() for every batch."""

    def __init__(self) -> None:
        self.service: LlamaService | None = None  # the leader's
        self.batch_size = 0  # the frontend's maximum number of requests in flight
        self._exchanges: dict[str, Exchange] = {}  # the requests that the frontend waits for

    def initialize(self, context: Any) -> None:
        """Load the model on all ranks, or on none. RuntimeError is the only error that TorchServe reports."""
        quieten_torchserve()
        threading.Thread(target=end_with_frontend, args=(os.getppid(),), name="frontend watch", daemon=True).start()
        self.batch_size = context.system_properties["batch_size"]
        started = time.monotonic()
        self.service = start_service(
            context.model_yaml_config,
            model_name=context.model_name,
            model_version=version_of(context),
            model_dir=context.system_properties["model_dir"],
            lead=int(os.environ.get("LOCAL_RANK", "0")) == 0,
        )
        if self.service is not None:
            start_publishing(self.service, context, time.monotonic() - started)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Submit new requests, cancel those that are gone, return new output. Never raises."""
        service = self.service
        if service is None:
            return [b""] * len(data)
        batch = Batch(data, context)
        for request_id in self._exchanges.keys() - batch.unanswered.keys():
            del self._exchanges[request_id]
            service.close(request_id)
        for request_id in batch.unanswered:
            if request_id not in self._exchanges:
                self._open(service, batch, request_id)
        if not service.open_ids:
            time.sleep(POLL_S)  # only unanswerable requests are pending: do not spin
        for reply in service.poll(POLL_S):
            batch.reply(reply, self._exchanges[reply.request_id])
            if reply.is_last:
                del self._exchanges[reply.request_id]
        if len(data) >= self.batch_size:
            self._probe_clients(service, batch)
        return batch.finish()

    def _open(self, service: LlamaService, batch: Batch, request_id: str) -> None:
        headers = batch.headers(request_id)
        exchange = self._exchanges[request_id] = Exchange.of(headers)
        if exchange.transport is Transport.GRPC_SEQUENCE:
            log.error(
                "request %s used gRPC's StreamPredictions2: its slot is lost until TorchServe is restarted",
                request_id,
            )
            return
        route = str(headers.get("url_path", ""))
        try:
            body = body_in(batch.parameters(request_id), exchange.transport)
        except ApiError as error:
            service.refuse(request_id, error, route)
        else:
            can_stream = exchange.transport is Transport.HTTP
            service.open(request_id, body, route, can_stream=can_stream, credentials=credentials_in(headers))

    def _probe_clients(self, service: LlamaService, batch: Batch) -> None:
        """All slots are taken: begin sending non-streaming answers, the only way to detect disconnected clients.

        Not before their first token, so that earlier errors keep their status.
        """
        now = time.monotonic()
        for request_id in list(batch.unanswered):
            exchange = self._exchanges[request_id]
            if service.is_generating(request_id) and exchange.is_due(now):
                batch.reply(Reply(request_id, b"", is_last=False), exchange)


def version_of(context: Any) -> str:
    """The model's version in URLs."""
    return str((context.manifest or {}).get("model", {}).get("modelVersion", "1.0"))


def end_with_frontend(agent: int) -> None:
    """When the Java frontend dies, kill the torchrun agent, and with it all ranks.

    Otherwise the agent would start new ranks, which would wait half a minute for the dead frontend.
    """
    if not hasattr(os, "pidfd_open"):  # Linux only
        return
    frontend = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    select.select([os.pidfd_open(frontend)], [], [])
    os.kill(agent, signal.SIGKILL)


def quieten_torchserve() -> None:
    """Drop the log noise of TorchServe's worker: a line and a metric per handle(), and tracebacks of rejected loads."""
    noise = ("skip sending response", "Backend received inference")
    logging.getLogger().addFilter(lambda record: not str(record.msg).startswith(noise))
    metrics = logging.getLogger("ts.metrics.caching_metric")
    metrics.addFilter(lambda record: "PredictionTime." not in str(record.msg))
    logging.getLogger().addFilter(drop_refusal)


def drop_refusal(record: logging.LogRecord) -> bool:
    """Drop the worker's two tracebacks per rank for a load that failed due to user input; its reason is already logged
    in one line. Tracebacks of bugs stay."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and str(error) == "500 - Unknown exception":  # the worker's wording for any error
        record.exc_info = None
    return not isinstance(error, RuntimeError) or not isinstance(error.__cause__, (ValueError, OSError))
