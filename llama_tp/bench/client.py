"""An HTTP/1.1 load generator, light enough to share two cores with the server that it measures.

One asyncio loop, one connection per request, and a parser for what servers send: a status line, headers, and a body
that is chunked, has a length, or ends with the connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llama_tp.bench.api import Answer, Api
from llama_tp.bench.workload import Job, Recorder

STALL_S = 120.0
"""A server that sends nothing to any request for this long has failed."""


class StatusError(OSError):
    """The server answered with a status other than 200."""

    def __init__(self, url: str, status: int, body: str) -> None:
        super().__init__(f"{url} answered {status}: {body}")
        self.status = status


class ResponseParser:
    """An incremental parser for one response (RFC 9112). ValueError if it is malformed."""

    def __init__(self) -> None:
        self.status = 0
        """0 until the headers are complete."""
        self.is_complete = False
        self._buffer = bytearray()
        self._left = 0  # bytes still missing of the chunk, or of a body with a length
        self._is_chunked = False
        self._in_trailers = False
        self._ends_with_connection = False

    def feed(self, data: bytes) -> bytes:
        """Parse received data; returns the part of the body in it."""
        self._buffer += data
        body = bytearray()
        while not self.is_complete and self._advance(body):
            pass
        return bytes(body)

    def end(self) -> None:
        """The connection has been closed. ConnectionError if that does not end the response."""
        self.is_complete = self.is_complete or self._ends_with_connection
        if not self.is_complete:
            raise ConnectionError("the server closed the connection before the response was complete")

    def _advance(self, body: bytearray) -> bool:
        """Parse one element. False if it is not complete yet."""
        if self._ends_with_connection:
            body += self._buffer
            self._buffer.clear()
            return False
        if self._left:
            taken = self._buffer[: self._left]
            del self._buffer[: self._left]
            body += taken
            self._left -= len(taken)
            self.is_complete = not (self._left or self._is_chunked)
            return bool(taken)
        end = b"\r\n" if self.status else b"\r\n\r\n"
        at = self._buffer.find(end)
        if at < 0:
            return False
        element = bytes(self._buffer[:at])
        del self._buffer[: at + len(end)]
        if self.status:
            self._read_chunk_line(element)
        else:
            self._read_head(element)
        return True

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        if not first.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")):
            raise ValueError(f"not an HTTP/1.1 response: {first[:64]!r}")
        self.status = int(first.split(None, 2)[1])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self._is_chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._ends_with_connection = not self._is_chunked and b"content-length" not in headers
        if b"content-length" in headers and not self._is_chunked:
            self._left = int(headers[b"content-length"])
            self.is_complete = not self._left

    def _read_chunk_line(self, line: bytes) -> None:
        """The size of a chunk, the empty line after one, or a trailer."""
        if self._in_trailers:
            self.is_complete = not line
        elif line:
            self._left = int(line.partition(b";")[0], 16)
            self._in_trailers = not self._left


class _Exchange(asyncio.Protocol):
    """One request and its response, on its own connection; `done` completes or has the error."""

    def __init__(self, url: str, request: bytes, answer: Answer, on_tokens: Callable[[int], None]) -> None:
        """`url` is for messages."""
        self._url = url
        self._request = request
        self._answer = answer
        self._on_tokens = on_tokens
        self._parser = ResponseParser()
        self._rest = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._read(data)
        except (ValueError, LookupError, TypeError, OSError) as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self._parser.end()
            self._complete()
        except (ValueError, LookupError, TypeError, OSError) as error:
            self._end(exc or error)

    def _read(self, data: bytes) -> None:
        body = self._rest + self._parser.feed(data)
        if self._parser.status in (0, 200):
            *lines, self._rest = body.split(b"\n")
            for line in lines:
                self._read_line(line)
        else:
            self._rest = body
        if self._parser.is_complete:
            self._complete()

    def _complete(self) -> None:
        """The response is complete; what is left of it is a line that does not end, or the text of an error."""
        if self.done.done():
            return
        if self._parser.status != 200:
            raise StatusError(
                self._url, self._parser.status, " ".join(self._rest[:500].decode(errors="replace").split())
            )
        self._read_line(self._rest)
        self._end(None)

    def _read_line(self, line: bytes) -> None:
        if count := self._answer.read(line):
            self._on_tokens(count)

    def _end(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            is_told = isinstance(error, StatusError)
            self.done.set_exception(error if is_told else OSError(f"{self._url}: {_reason(error)}"))


def _reason(error: Exception) -> str:
    """Why reading an answer failed, in words."""
    return str(error) if isinstance(error, OSError) else f"the answer cannot be read: {error!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A served model."""

    host: str = "127.0.0.1"
    port: int
    path: str
    """Of the model, /predictions/NAME, or the base of an OpenAI-compatible API, such as /v1."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with each request: the API key."""

    @property
    def authority(self) -> str:
        """Host and port, as in URLs."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.authority}{self.path}"


def request_bytes(job: Job, target: Target, api: Api) -> bytes:
    """The complete POST of one job: streamed, greedy, ending only by length."""
    body = json.dumps(api.fields(job), separators=(",", ":")).encode()
    lines = [f"POST {target.path}{api.route} HTTP/1.1", f"Host: {target.authority}"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in target.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def drive(jobs: Sequence[Job], target: Target, api: Api, *, concurrency: int) -> Recorder:
    """Send the jobs as they arrive and read all answers. OSError for the first request that fails."""
    requests = [request_bytes(job, target, api) for job in jobs]
    return asyncio.run(_drive(jobs, requests, target, api, concurrency))


async def _drive(
    jobs: Sequence[Job], requests: Sequence[bytes], target: Target, api: Api, concurrency: int
) -> Recorder:
    slots = asyncio.Semaphore(concurrency or len(jobs))
    recorder = Recorder(len(jobs))
    waiting: set[int] = set()  # requests waiting for the server

    async def run(index: int) -> None:
        await asyncio.sleep(jobs[index].arrival_s - recorder.now())
        async with slots:
            recorder.start(index, recorder.now() if concurrency else jobs[index].arrival_s)
            waiting.add(index)
            answer = api.answer()
            await _exchange(requests[index], target, api, answer, lambda count: recorder.tokens(index, count))
            recorder.complete(index, _total(answer, jobs[index], target, api))
            waiting.discard(index)

    pending = {asyncio.ensure_future(run(index)) for index in range(len(jobs))}
    try:
        while pending:
            before, seen = set(waiting), recorder.num_chunks
            done, pending = await asyncio.wait(pending, timeout=STALL_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if before & waiting and seen == recorder.num_chunks:
                raise TimeoutError(f"the server has sent nothing for {STALL_S:g} s")
    finally:
        for task in pending:
            task.cancel()
    return recorder


def _total(answer: Answer, job: Job, target: Target, api: Api) -> int:
    try:
        return answer.complete(job.new)
    except OSError as error:
        raise OSError(f"{target.url}{api.route}: {error}") from None


async def _exchange(request: bytes, target: Target, api: Api, answer: Answer, on_tokens: Callable[[int], None]) -> None:
    loop = asyncio.get_running_loop()
    url = f"{target.url}{api.route}"
    transport, exchange = await loop.create_connection(
        lambda: _Exchange(url, request, answer, on_tokens), target.host, target.port
    )
    try:
        await exchange.done
    finally:
        transport.close()
