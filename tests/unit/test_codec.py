"""A plan arrives as it was sent."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.engine.codec import decode, encode
from llama_tp.engine.step import Chunk, StepPlan

words = st.integers(0, 2**31 - 1)
chunks = st.builds(
    Chunk, row=words, start=words, tokens=st.lists(words, max_size=40).map(tuple), num_logits=st.integers(0, 300)
)
plans = st.builds(
    StepPlan,
    step=words,
    chunks=st.lists(chunks, max_size=6).map(tuple),
    page_updates=st.lists(st.tuples(words, words, words), max_size=12).map(tuple),
    freed=st.lists(words, max_size=6).map(tuple),
    digest=st.none() | st.integers(0, 2**32 - 1),
    stop=st.booleans(),
)


@settings(deadline=None)
@given(plans)
def test_a_plan_arrives_as_it_was_sent(plan):
    arrived = decode(encode(plan))
    assert arrived == plan
    assert arrived.stop is plan.stop


@settings(deadline=None, max_examples=30)
@given(plans, st.integers(1, 3))
def test_a_plan_that_was_cut_or_padded_is_not_taken_for_another(plan, num_words):
    message = encode(plan)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        decode(message[: -4 * num_words])
    with pytest.raises(AssertionError):
        decode(message + bytes(4 * num_words))


def test_the_plan_of_a_decode_step_of_32_sequences_is_smaller_than_a_kilobyte():
    plan = StepPlan(1, tuple(Chunk(row, 100, (7,), 1) for row in range(32)), ((3, 6, 9), (4, 6, 10)))
    assert len(encode(plan)) < 1024
