"""StepPlan <-> bytes, as 32-bit integers in the machine's order: the group is of one kind of machine.
Step numbers wrap at 2**31.

Layout: [step, stop, chunks, updates], then per chunk [row, start, sample, n, token * n], then per update three.
"""

from __future__ import annotations

from array import array

from llama_tp.engine.request import Chunk, StepPlan


def encode(plan: StepPlan) -> bytes:
    words = array("i", (plan.step & 0x7FFFFFFF, plan.stop, len(plan.chunks), len(plan.page_updates)))
    for chunk in plan.chunks:
        words.extend((chunk.row, chunk.start, chunk.sample, len(chunk.tokens)))
        words.extend(chunk.tokens)
    for update in plan.page_updates:
        words.extend(update)
    return words.tobytes()


def decode(message: bytes) -> StepPlan:
    words = array("i")
    words.frombytes(message)
    step, stop, num_chunks, num_updates = words[:4]
    at = 4
    chunks = []
    for _ in range(num_chunks):
        row, start, sample, n = words[at : at + 4]
        at += 4
        chunks.append(Chunk(row, start, tuple(words[at : at + n]), bool(sample)))
        at += n
    updates = tuple((words[i], words[i + 1], words[i + 2]) for i in range(at, at + 3 * num_updates, 3))
    assert at + 3 * num_updates == len(words), "a plan arrived truncated"
    return StepPlan(step, tuple(chunks), updates, bool(stop))
