"""StepPlan <-> bytes, as 32-bit integers in native byte order: all ranks run on the same architecture.
Step numbers wrap at 2**31.

Layout: [step, stop, chunks, updates, freed, has digest, digest], then per chunk [row, start, logits, n, token * n],
three integers per update, the freed table rows.
"""

from __future__ import annotations

from array import array

from llama_tp.engine.step import Chunk, StepPlan

_HEAD = 7


def encode(plan: StepPlan) -> bytes:
    digest = plan.digest or 0
    words = [plan.step & 0x7FFFFFFF, plan.stop, len(plan.chunks), len(plan.page_updates), len(plan.freed)]
    words += (plan.digest is not None, digest - (1 << 32) if digest >> 31 else digest)
    for chunk in plan.chunks:
        words += (chunk.row, chunk.start, chunk.num_logits, len(chunk.tokens))
        words += chunk.tokens
    for update in plan.page_updates:
        words += update
    words += plan.freed
    return array("i", words).tobytes()


def decode(message: bytes) -> StepPlan:
    words = memoryview(message).cast("i").tolist()
    step, stop, num_chunks, num_updates, num_freed, has_digest, digest = words[:_HEAD]
    at = _HEAD
    chunks = []
    for _ in range(num_chunks):
        row, start, num_logits, n = words[at : at + 4]
        at += 4
        chunks.append(Chunk(row, start, tuple(words[at : at + n]), num_logits))
        at += n
    end = at + 3 * num_updates
    updates = tuple((words[i], words[i + 1], words[i + 2]) for i in range(at, end, 3))
    freed = tuple(words[end : end + num_freed])
    assert end + num_freed == len(words), "a plan arrived truncated"
    return StepPlan(step, tuple(chunks), updates, freed, digest & 0xFFFFFFFF if has_digest else None, stop == 1)
