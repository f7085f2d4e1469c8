"""Sequences lie in neighbouring pages, also when the cache has been full for long, and what is lost is what was used
least recently. That pages are counted and shared rightly is held to by test_scheduler."""

from __future__ import annotations

import random
from itertools import pairwise

from llama_tp.config import EngineConfig
from llama_tp.engine.block_manager import BlockManager
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.scheduler import Scheduler


def num_runs(pages):
    """How many stretches of neighbours."""
    return 1 + sum(after != before + 1 for before, after in pairwise(pages))


class Conversation:
    """A sequence as the scheduler would drive it, of tokens that no other has unless they are given."""

    fresh = 0

    def __init__(self, blocks, num_pages, *, likely=0, prompt=()):
        self.blocks = blocks
        Conversation.fresh += 1
        own = num_pages * blocks.page_size - len(prompt)
        self.tokens = [*prompt, *((Conversation.fresh, at) for at in range(own))]
        self.pages = blocks.match([*self.tokens, None])
        self.reservation = range(0)
        self.num_shared = len(self.pages)
        blocks.share(list(self.pages))
        for index in range(self.num_shared, num_pages):
            self.grow(max(likely, num_pages) - index)

    def grow(self, likely):
        page, self.reservation = self.blocks.allocate(self.pages, self.reservation, likely)
        assert page is not None
        self.pages.append(page)

    def end(self):
        size = self.blocks.page_size
        for index in range(len(self.pages)):
            self.blocks.register(self.pages, index, self.tokens[index * size : (index + 1) * size])
        self.blocks.release(self.pages)
        self.blocks.cancel_reservation(self.reservation)

    @property
    def num_runs(self):
        return num_runs(self.pages)

    @property
    def num_kept(self):
        return len(self.blocks.match([*self.tokens, None]))


def test_sequences_of_one_length_lie_at_equal_distances_however_old_the_cache():
    blocks = BlockManager(num_pages=48, page_size=2, most=12)
    for _ in range(5):
        together = [Conversation(blocks, 8, likely=12) for _ in range(4)]
        for _ in range(4):
            for conversation in together:  # page by page, in turn
                conversation.grow(12 - len(conversation.pages))
        assert sorted(conversation.pages[0] for conversation in together) == [0, 12, 24, 36]
        assert all(conversation.num_runs == 1 for conversation in together)
        for conversation in together:
            conversation.end()


def test_the_end_of_what_was_used_least_recently_is_overwritten():
    blocks = BlockManager(num_pages=24, page_size=2, most=8)
    first, second, third = (Conversation(blocks, 8) for _ in range(3))
    for conversation in (second, third, first):
        conversation.end()
    Conversation(blocks, 4).end()
    assert (first.num_kept, second.num_kept, third.num_kept) == (8, 4, 8)


def test_the_next_turn_goes_on_behind_the_last_one():
    blocks = BlockManager(num_pages=32, page_size=2, most=8)
    turns = [Conversation(blocks, 3, likely=8) for _ in range(4)]
    for turn in turns:
        turn.end()
    for turn in turns:
        next_turn = Conversation(blocks, 7, prompt=turn.tokens)
        assert (next_turn.num_shared, next_turn.num_runs) == (3, 1)


def test_a_conversation_that_is_overwritten_in_the_middle_leaves_nothing_useless_behind():
    blocks = BlockManager(num_pages=16, page_size=2, most=16)
    conversation = Conversation(blocks, 16)
    conversation.end()
    blocks._forget(conversation.pages[4])
    assert (conversation.num_kept, len(blocks._kept), len(blocks._blank)) == (4, 4, 12)
    assert blocks.num_free == 16


def test_conversations_that_take_turns_are_all_found_again_if_their_pages_fit():
    random_ = random.Random(3)
    blocks = BlockManager(num_pages=512, page_size=2, most=64)
    tokens: list[list[tuple[int, int]]] = [[] for _ in range(10)]
    num_found = num_pages = 0
    for _ in range(300):
        which = random_.randrange(len(tokens))
        before = tokens[which] if len(tokens[which]) < 60 else []
        turn = Conversation(blocks, len(before) // 2 + random_.randint(1, 5), likely=16, prompt=before)
        num_found, num_pages = num_found + turn.num_shared, num_pages + len(before) // 2
        tokens[which] = turn.tokens
        turn.end()
    assert num_found == num_pages


def test_sequences_shorter_than_the_smallest_reservation_are_adjacent_too():
    blocks = BlockManager(num_pages=12, page_size=2, most=3)
    assert [Conversation(blocks, 3).pages for _ in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_another_answer_to_one_system_prompt_leaves_the_first_where_it_is():
    blocks = BlockManager(num_pages=24, page_size=2, most=8)
    first = Conversation(blocks, 6)
    first.end()
    second = Conversation(blocks, 6, prompt=first.tokens[:4])
    assert (second.num_shared, second.num_runs) == (2, 2)
    second.end()
    assert (first.num_kept, second.num_kept) == (6, 6)


def test_sequences_that_share_a_prefix_lie_at_equal_distances_behind_it():
    blocks = BlockManager(num_pages=64, page_size=2, most=16)
    system = Conversation(blocks, 4)
    system.end()
    together = [Conversation(blocks, 7, likely=8, prompt=system.tokens) for _ in range(5)]
    firsts = sorted(conversation.pages[4] for conversation in together)
    assert all(conversation.pages[:4] == system.pages for conversation in together)
    assert firsts[0] == 4, "one of them goes on behind it"
    assert {after - before for before, after in pairwise(firsts)} == {4}


def test_short_sequences_do_not_cost_the_place_of_long_ones():
    """Sixteen turns of an eighth of the context each are all still there in a cache of two contexts."""
    blocks = BlockManager(num_pages=64, page_size=2, most=32)
    turns = [Conversation(blocks, 4) for _ in range(16)]
    for turn in turns:
        turn.end()
    assert all(turn.num_kept == 4 for turn in turns)


def test_a_reservation_is_kept_until_nothing_else_is_left():
    blocks = BlockManager(num_pages=16, page_size=2, most=8)
    first, second = (Conversation(blocks, 1, likely=8) for _ in range(2))
    third = Conversation(blocks, 14)
    assert blocks.num_free == 0
    assert third.num_runs > 1
    page, first.reservation = blocks.allocate(first.pages, first.reservation, 7)
    assert page is None
    third.end()
    for conversation in (first, second):
        conversation.end()
    assert blocks.num_free == 16
    assert not any(blocks._busy)


def test_a_claimed_page_is_not_taken_while_a_lone_one_is_free():
    blocks = BlockManager(num_pages=12, page_size=2, most=8)
    for conversation in [Conversation(blocks, 4) for _ in range(3)][::-1]:  # the last pages are blank for longest
        blocks.release(conversation.pages)
    first = Conversation(blocks, 1, likely=8)  # reserves the 7 pages behind its own
    others = [Conversation(blocks, 1, likely=1) for _ in range(4)]
    assert all(other.pages[0] not in first.reservation for other in others)
    taken = Conversation(blocks, 1, likely=8)
    assert taken.pages[0] in first.reservation, "nothing else is left"


def test_a_server_that_has_run_for_long_reads_nearly_every_sequence_in_place():
    """Mixed lengths, ends that nobody knows, and half of the requests behind one of two system prompts."""
    random_ = random.Random(0)
    config = EngineConfig(max_seq_len=256, max_batch_size=8, max_batched_tokens=512, page_size=4)
    scheduler = Scheduler(config)
    systems = [tuple(range(start, start + 40)) for start in (1000, 2000)]
    waiting = 400
    runs: list[int] = []
    while waiting or len(scheduler):
        while waiting and len(scheduler) < 8:
            waiting -= 1
            prompt = random_.choice([(), (), *systems]) + tuple(random_.choices(range(900), k=random_.randint(4, 100)))
            params = SamplingParams(max_new_tokens=256 - len(prompt), stop_ids=frozenset({999}))
            scheduler.add(Request(str(waiting), prompt, params))
        _, sampled = scheduler.plan()
        ends = [random_.random() < 0.03 for _ in sampled]
        for sequence, end in zip(sampled, ends, strict=True):
            if end and waiting < 350:
                starts = [
                    at for at in range(1, len(sequence.pages)) if sequence.pages[at] != sequence.pages[at - 1] + 1
                ]
                runs.append(1 + len(starts))
        scheduler.commit([999 if end else random_.randrange(900) for end in ends])
    assert scheduler.num_preemptions == 0
    assert not any(scheduler.blocks._busy)
    assert sum(count == 1 for count in runs) / len(runs) > 0.4
    assert sum(count <= 2 for count in runs) / len(runs) > 0.9
    assert max(runs) <= 4
