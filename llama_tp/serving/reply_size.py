"""How large replies may be, in any dialect."""

from __future__ import annotations

from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest

MAX_CHUNK_BYTES = 64 * 1024
"""Maximum bytes of a stream that are sent at once, and of a line with new tokens."""
MAX_CHUNK_TOKENS = 64
"""Maximum tokens per line of a stream; fewer if tokens take many bytes."""
MAX_CHUNK_OUTPUTS = 16
"""Maximum outputs per message of a stream."""
MAX_ANSWER_BYTES = 6 * 2**20
"""Maximum bytes of a non-streaming answer: one above max_response_size would end TorchServe's worker."""


def chunk_tokens(request: GenerationRequest, longest_token: int, *, more_records: int = 0) -> int:
    """How many tokens of up to `longest_token` bytes are sure to fit into a line of a stream.

    At worst, a byte becomes a control character's \\u0000 in a text and a three-digit number in a list. Space is left
    for text held back as a possible stop string. `more_records`: of log probabilities, for each token that has any,
    besides its own and those of the most probable ones.
    """
    params = request.sampling
    tops = [top for top in (params.logprobs, params.prompt_logprobs) if top is not None]
    num_records = 1 + max(tops) + more_records if tops else 0
    num_bytes = 96 + 6 * longest_token + num_records * (96 + 10 * longest_token)
    return max(1, min(MAX_CHUNK_TOKENS, (MAX_CHUNK_BYTES - 4096) // num_bytes))


def cut_size(chunk: bytes) -> int:
    """How many bytes of a chunk to send at once: at most MAX_CHUNK_BYTES, whole lines or at least whole characters."""
    if len(chunk) <= MAX_CHUNK_BYTES:
        return len(chunk)
    if size := chunk.rfind(b"\n", 0, MAX_CHUNK_BYTES) + 1:
        return size
    size = MAX_CHUNK_BYTES
    while chunk[size] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        size -= 1
    return size


def chunk_outputs(request: GenerationRequest, prompt_bytes: int) -> int:
    """How many outputs may have a part in one message of a stream, which must stay below MAX_ANSWER_BYTES, too. The
    first part of an output may echo a prompt of `prompt_bytes` for each of its n siblings; each byte may become
    \\u0000."""
    if not request.reply.echo:
        return MAX_CHUNK_OUTPUTS
    if request.sampling.prompt_logprobs is not None:
        return 1
    num_bytes = 6 * prompt_bytes * request.sampling.n
    return max(1, min(MAX_CHUNK_OUTPUTS, MAX_ANSWER_BYTES // 2 // max(1, num_bytes)))


def check_answer(body: bytes, *, param: str = "stream", remedy: str = "set stream to get it") -> None:
    """ApiError for a non-streaming answer, or a message of a stream, over MAX_ANSWER_BYTES."""
    if len(body) > MAX_ANSWER_BYTES:
        message = f"the answer has {len(body)} bytes, but may have at most {MAX_ANSWER_BYTES}; {remedy}"
        raise ApiError(400, "answer_too_large", message, param)
