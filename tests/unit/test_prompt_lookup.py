"""The index finds what a scan of the whole sequence finds, at the cost of one token per token."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from llama_tp.engine.prompt_lookup import PromptLookup


def scan(tokens, most, sizes):
    """What followed the newest earlier occurrence of the last n tokens, for the first n that has one. Beyond the end of
    the sequence stand the tokens predicted so far."""
    for size in sizes:
        for at in range(len(tokens) - 1, size - 1, -1):
            if tokens[at - size : at] == tokens[-size:]:
                text = list(tokens)
                for i in range(most):
                    text.append(text[at + i])
                return tuple(text[len(tokens) :])
    return ()


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(1, 5), max_size=20),
    st.integers(1, 6),
    st.sampled_from([(3, 2), (3, 2, 1), (1,), (4, 2)]),
)
@example([1, 2], [], 1, (3, 2))
@example([1, 1, 1, 1], [], 3, (3, 2))
def test_a_draft_is_what_a_scan_of_the_sequence_finds_however_it_has_grown(tokens, steps, most, sizes):
    lookup = PromptLookup(sizes)
    end = 1
    for step in [0, *steps, len(tokens)]:
        end = min(len(tokens), end + step)
        assert lookup.draft(tokens[:end], most) == scan(tokens[:end], most, sizes)


def test_the_longest_match_wins_and_then_the_newest():
    assert PromptLookup().draft([1, 2, 3, 7, 1, 2, 3, 8, 2, 3, 9, 1, 2, 3], 2) == (8, 2)
    assert PromptLookup().draft([1, 2, 3, 7, 5, 2, 3, 8, 4, 2, 3], 3) == (8, 4, 2)
    assert PromptLookup((1,)).draft([1, 2, 3, 4, 1], 3) == (2, 3, 4)


def test_a_repetition_shorter_than_the_draft_is_continued():
    assert PromptLookup().draft([5, 6, 7, 8, 7, 8, 7, 8], 5) == (7, 8, 7, 8, 7)
    assert PromptLookup().draft([0, 4, 4, 4], 3) == (4, 4, 4)


def test_nothing_is_predicted_without_a_repetition():
    assert PromptLookup().draft([1], 3) == ()
    assert PromptLookup().draft(list(range(50)), 3) == ()


def test_each_token_is_read_once_however_many_drafts_are_made():
    reads = 0

    class Counting(list):
        def __getitem__(self, at):
            nonlocal reads
            found = super().__getitem__(at)
            reads += len(found) if isinstance(found, list) else 1
            return found

    lookup, tokens = PromptLookup(), Counting(i * i % 97 for i in range(5000))
    lookup.draft(tokens, 4)
    reads_of_prompt = reads
    assert reads_of_prompt < 8 * 5000
    for i in range(100):
        tokens.append(i % 7)
        lookup.draft(tokens, 4)
    assert reads - reads_of_prompt < 100 * 20
