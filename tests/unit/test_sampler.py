"""Tokens are drawn from the documented distribution, by each request's own generator, whoever shares the batch.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from llama_tp.engine.request import Request
from llama_tp.engine.sampler import Sampler, probabilities
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.sequence import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = float("nan"), float("inf")


def row_of(request_id, **params):
    return Sequence(Request(request_id, (1,), SamplingParams(**params)), [1])


def sample(sampler, logits, rows):
    """The ids alone."""
    return sampler.sample(logits, rows)[0]


def random_logits(rows, vocab_size, seed=0, scale=2.0):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits, params):
    """One row in Python's float64: temperature, then top_k, top_p and min_p, as SamplingParams documents them."""
    weights = [math.exp((logit - max(logits)) / params.temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda token: -weights[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total = sum(weights[token] for token in ranked)
    kept, reached = [], 0.0
    for token in ranked:  # the smallest set whose probability reaches top_p
        if reached >= params.top_p and params.top_p < 1:  # the sum of all may round to less than 1, or reach it early
            break
        kept.append(token)
        reached += weights[token] / total
    kept = [token for token in kept if weights[token] >= params.min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def normalized(probs):
    return probs / probs.sum(dim=-1, keepdim=True)


def chi_square(counts, probs):
    total = sum(counts)
    return sum((count - total * p) ** 2 / (total * p) for count, p in zip(counts, probs, strict=True) if p)


GRID = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 5, 40, 100_000)
    for top_p in (0.05, 0.5, 0.9, 1.0)
    for min_p in (0.0, 0.1, 1.0)
]


def test_every_row_of_a_batch_has_the_reference_s_distribution():
    """All combinations in one batch, so that no row is filtered by its neighbour's parameters."""
    params = [SamplingParams(**one) for one in GRID]
    logits = random_logits(len(params), 50)
    probs = normalized(probabilities(logits, params))
    for row, one in enumerate(params):
        expected = torch.tensor(reference(logits[row].tolist(), one))
        assert ((probs[row] > 0) == (expected > 0)).all(), one
        torch.testing.assert_close(probs[row], expected, atol=1e-6, rtol=1e-4, msg=str(one))


@pytest.mark.parametrize("one", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {}], ids=str)
def test_a_row_alone_has_the_distribution_that_it_has_batched(one):
    """Filters that no row of the batch asks for are not computed."""
    logits = random_logits(3, 50)
    mixed = [SamplingParams(top_k=7, top_p=0.9, min_p=0.01), SamplingParams(**one), SamplingParams(temperature=0.5)]
    alone = probabilities(logits[1:2], mixed[1:2])
    torch.testing.assert_close(normalized(probabilities(logits, mixed)[1:2]), normalized(alone), atol=1e-7, rtol=1e-5)


def test_top_k_one_is_the_most_probable_token_and_of_equals_the_first():
    probs = probabilities(torch.tensor([[0.0, 3.0, 3.0, 1.0]]), [SamplingParams(top_k=1)])
    assert (probs[0] > 0).tolist() == [False, True, False, False]


def test_equals_at_the_edge_of_top_k_and_top_p_are_cut_in_order_of_their_ids():
    logits = torch.zeros(2, 4)
    probs = probabilities(logits, [SamplingParams(top_k=2), SamplingParams(top_p=0.7)])
    assert (probs > 0).tolist() == [[True, True, False, False], [True, True, True, False]]


def test_equals_of_the_most_probable_token_survive_min_p_one():
    probs = probabilities(torch.tensor([[2.0, 2.0, 1.9]]), [SamplingParams(min_p=1.0)])
    assert (probs[0] > 0).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "one",
    [
        {"temperature": 1e-5},
        {"temperature": 1e-4, "top_p": 1e-6},
        {"top_p": 1e-6},
        {"top_p": 5e-324},
        {"top_k": 1},
        {"top_k": 1, "top_p": 5e-324, "min_p": 1.0},
        {"min_p": 1.0},
        {"temperature": 2.0, "top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e30])
def test_the_narrowest_parameters_leave_the_most_probable_token(one, scale):
    logits = random_logits(1, 200) * scale
    tokens = {sample(Sampler(), logits, [row_of("a", seed=seed, **one)])[0] for seed in range(20)}
    assert tokens == {logits.argmax().item()}


@pytest.mark.parametrize("one", [{"temperature": 1e300}, {"top_p": 1 - 1e-12}, {"top_k": 2**31 - 1}, {"min_p": 5e-324}])
def test_the_widest_parameters_leave_every_token(one):
    probs = probabilities(random_logits(1, 50, scale=0.5), [SamplingParams(**one)])
    assert (probs > 0).all()


def test_minus_infinity_is_a_token_that_never_comes():
    logits = torch.tensor([[0.0, -INF, 0.0, -INF]])
    rows = [row_of("a", seed=1)]
    sampler = Sampler()
    assert {sample(sampler, logits, rows)[0] for _ in range(100)} == {0, 2}


def test_draws_follow_the_distribution():
    """20,000 draws; chi-square with 5 and 7 degrees of freedom exceeds 24.3 once in 1000."""
    logits = torch.tensor([0.3, -1.0, 2.0, 1.2, 0.0, -0.4, 0.9, 1.1])
    for one in ({}, {"temperature": 0.7, "top_p": 0.95}):
        params = SamplingParams(**one)
        sampler, rows = Sampler(), [row_of(f"r{i}", seed=i, **one) for i in range(50)]
        counts = [0] * 8
        for _ in range(200):
            for token in sample(sampler, logits.expand(50, -1), rows):
                counts[token] += 1
        expected = reference(logits.tolist(), params)
        assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
        assert chi_square(counts, expected) < 24.3


def test_neighbouring_seeds_draw_independently():
    """The first draws of seeds 0 to 3999, each from a generator of its own."""
    logits = torch.tensor([0.3, -1.0, 2.0, 1.2])
    rows = [row_of(f"r{seed}", seed=seed) for seed in range(4000)]
    tokens = sample(Sampler(), logits.expand(4000, -1), rows)
    probs = reference(logits.tolist(), SamplingParams())
    assert chi_square([tokens.count(token) for token in range(4)], probs) < 16.3
    pairs = list(itertools.pairwise(tokens))
    joint = [p * q for p in probs for q in probs]
    assert chi_square([pairs.count((a, b)) for a in range(4) for b in range(4)], joint) < 37.7


def draws(request_id, logits, count=30, company=(), at=0, **params):
    """The request's tokens when it is drawn `count` times as row `at` of its company."""
    sampler, tokens = Sampler(), []
    rows = [row_of(f"other{i}", **one) for i, one in enumerate(company)]
    rows.insert(at, row_of(request_id, **params))
    for step in range(count):
        batch = random_logits(len(rows), logits.size(-1), seed=step)
        batch[at] = logits
        tokens.append(sample(sampler, batch, rows)[at])
    return tokens


def test_the_same_seed_draws_the_same_tokens_in_any_company_and_any_row():
    logits = random_logits(1, 300)[0]
    params = {"seed": 5, "temperature": 0.8, "top_p": 0.95}
    alone = draws("a", logits, **params)
    company = [{"temperature": 0}, {"seed": 5}, {"seed": 6, "top_k": 3}, {"min_p": 0.3}]
    assert len(set(alone)) > 5
    assert draws("b", logits, **params) == alone
    for at in range(5):
        assert draws("a", logits, company=company, at=at, **params) == alone


def test_other_seeds_and_no_seed_draw_other_tokens():
    logits = random_logits(1, 300)[0]
    series = [tuple(draws("a", logits, seed=seed)) for seed in (0, 1, 2**31, 2**63 - 1, None, None)]
    assert len(set(series)) == len(series)


def test_a_request_that_has_ended_leaves_no_generator_behind():
    sampler, logits = Sampler(), random_logits(1, 300)
    first = [sample(sampler, logits, [row_of("a", seed=3)])[0] for _ in range(5)]
    sampler.forget("a")
    sampler.forget("a")
    assert [sample(sampler, logits, [row_of("a", seed=3)])[0] for _ in range(5)] == first
    sampler.forget("a")
    assert sampler.is_idle


def test_greedy_takes_the_first_of_the_most_probable_tokens_and_draws_no_random_number():
    logits = torch.tensor([[1.0, 4.0, 4.0], [2.0, 0.0, 1.0]])
    sampler, state = Sampler(), torch.get_rng_state()
    assert sample(sampler, logits, [row_of("a", temperature=0), row_of("b", temperature=9e-6)]) == [1, 0]
    assert sampler.is_idle
    assert torch.equal(torch.get_rng_state(), state)


def test_drawing_leaves_torch_s_own_generator_alone():
    state = torch.get_rng_state()
    sample(Sampler(), random_logits(2, 9), [row_of("a"), row_of("b", seed=1)])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("poison", [[NAN], [INF], [NAN, INF], [-INF] * 300, [NAN] * 300], ids=len)
@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_a_nonfinite_row_has_no_token_and_leaves_its_neighbours_token_identical(poison, params):
    healthy = random_logits(3, 300)
    nonfinite = healthy.clone()
    nonfinite[1, 100 : 100 + len(poison)] = torch.tensor(poison)[:200]
    if len(poison) == 300:
        nonfinite[1] = torch.tensor(poison)
    rows = [row_of("a", **params), row_of("bad", **params), row_of("c", **params)]
    expected = sample(Sampler(), healthy, rows)
    assert expected[1] is not None
    assert sample(Sampler(), nonfinite, rows) == [expected[0], None, expected[2]]


def test_logits_are_left_as_they_were():
    logits = random_logits(3, 20)
    before = logits.clone()
    sample(Sampler(), logits, [row_of("a", temperature=0), row_of("b", top_p=0.5), row_of("c", top_k=2, min_p=0.5)])
    assert torch.equal(logits, before)


def holding(request_id, prompt, output, **params):
    """A sequence that has already generated."""
    return Sequence(Request(request_id, tuple(prompt), SamplingParams(**params)), [*prompt, *output])


def edited_by_the_book(logits, sequence):
    """One row in plain Python: penalties, then logit_bias, then min_new_tokens."""
    params, prompt = sequence.request.params, sequence.request.prompt
    output = sequence.tokens[len(prompt) :]
    logits = list(logits)
    for token in set(sequence.tokens):
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(output) < params.min_new_tokens:
        for token in params.stop_ids:
            logits[token] = -INF
    return logits


EDITS = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 0.8},
    {"frequency_penalty": -0.6},
    {"logit_bias": {3: 5.0, 49: -100.0, 7: 0.5}},
    {"min_new_tokens": 9, "stop_ids": frozenset({2, 7}), "max_new_tokens": 20},
    {"min_new_tokens": 4, "stop_ids": frozenset({2, 7}), "max_new_tokens": 20},  # it has 6 already
    {
        "repetition_penalty": 2.0,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.4,
        "logit_bias": {7: 9.0, 11: 2.0},
        "min_new_tokens": 7,
        "stop_ids": frozenset({7}),
    },
]


def test_penalties_biases_and_minimum_lengths_are_those_of_the_book_row_by_row():
    rows = [holding(str(i), (5, 7, 7, 11), (9, 9, 5, 30, 9, 7), **one) for i, one in enumerate(EDITS)]
    logits = random_logits(len(rows), 50)
    edited = Sampler().edit(logits, rows)
    for row, sequence in enumerate(rows):
        expected = torch.tensor(edited_by_the_book(logits[row].tolist(), sequence))
        torch.testing.assert_close(edited[row], expected, atol=1e-6, rtol=1e-6, msg=str(EDITS[row]))
        alone = Sampler().edit(logits[row : row + 1], [sequence])
        assert torch.equal(alone[0], edited[row]), "the company has changed a row"


def test_counts_follow_the_sequence_as_it_grows():
    sampler, params = Sampler(), {"frequency_penalty": 1.0, "presence_penalty": 0.25, "repetition_penalty": 1.5}
    growing = holding("a", (1, 2), (), **params)
    logits = random_logits(1, 12)
    for token in (3, 3, 1, 9, 3, 1):
        expected = torch.tensor([edited_by_the_book(logits[0].tolist(), growing)])
        torch.testing.assert_close(sampler.edit(logits, [growing]), expected, atol=1e-6, rtol=1e-6)
        growing.tokens.append(token)


def test_rows_that_ask_for_nothing_cost_nothing():
    logits = random_logits(2, 9)
    assert Sampler().edit(logits, [row_of("a"), row_of("b", seed=1, min_new_tokens=3)]) is logits


def test_greedy_takes_the_best_of_the_edited_logits():
    logits = torch.tensor([[1.0, 4.0, 3.0], [1.0, 4.0, 3.0], [1.0, 4.0, 3.0]])
    rows = [
        row_of("a", temperature=0, logit_bias={1: -2.0}),
        holding("b", (2,), (1,), temperature=0, repetition_penalty=4.0),
        row_of("c", temperature=0, min_new_tokens=1, stop_ids=frozenset({1})),
    ]
    assert sample(Sampler(), logits, rows) == [2, 0, 2]


def test_penalised_draws_follow_the_edited_distribution():
    """10,000 draws; chi-square with 5 degrees of freedom exceeds 20.5 once in 1000."""
    logits = torch.tensor([0.3, -1.0, 2.0, 1.2, 0.0, -0.4])
    one = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.2, "logit_bias": {5: 1.0}}
    sampler, counts = Sampler(), [0] * 6
    rows = [holding(f"r{i}", (1, 4), (2, 2, 3), seed=i, **one) for i in range(50)]
    for _ in range(200):
        for token in sample(sampler, logits.expand(50, -1), rows):
            counts[token] += 1
    expected = reference(edited_by_the_book(logits.tolist(), rows[0]), SamplingParams())
    assert chi_square(counts, expected) < 20.5


def test_a_nonfinite_row_is_noticed_before_it_is_edited():
    logits = torch.tensor([[1.0, INF, 0.0], [1.0, 3.0, 2.0]])
    rows = [row_of(name, temperature=0, min_new_tokens=1, stop_ids=frozenset({1})) for name in "ab"]
    assert sample(Sampler(), logits, rows) == [None, 2]


def test_log_probabilities_are_those_of_the_unmodified_distribution():
    logits = random_logits(4, 30)
    rows = [
        row_of("none"),
        row_of("chosen", temperature=0, logprobs=0, logit_bias={3: 100.0}),
        row_of("three", temperature=0.1, top_k=1, logprobs=3),
        row_of("all", temperature=0, logprobs=100),
    ]
    ids, logprobs = Sampler().sample(logits, rows)
    assert ids[1] == 3
    logs = torch.log_softmax(logits.double(), dim=-1)
    assert logprobs.keys() == {1, 2, 3}
    assert [len(logprobs[row].top) for row in (1, 2, 3)] == [0, 3, 30]
    for row, one in logprobs.items():
        assert one.chosen == pytest.approx(logs[row, ids[row]].item(), abs=1e-5)
        best = logs[row].argsort(descending=True)[: len(one.top)].tolist()
        assert [token for token, _ in one.top] == best
        assert [value for _, value in one.top] == pytest.approx([logs[row, token].item() for token in best], abs=1e-5)
    logits[1, 7] = NAN
    assert Sampler().sample(logits, rows)[1].keys() == {2, 3}, "a nonfinite row has none"


def test_the_outputs_of_one_request_draw_as_requests_of_successive_seeds_do():
    logits = random_logits(1, 300)[0]
    sampler = Sampler()
    request = Request("a", (1,), SamplingParams(seed=5, n=3))
    outputs = [Sequence(request, [1], index) for index in range(3)]
    drawn = [sample(sampler, logits.expand(3, -1), outputs) for _ in range(20)]
    for index in range(3):
        assert [step[index] for step in drawn] == draws("b", logits, count=20, seed=5 + index)
    sampler.forget("a")
    assert sampler.is_idle


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", INF),
        ("presence_penalty", NAN),
        ("frequency_penalty", -INF),
        ("logit_bias", {1: NAN}),
        ("n", 0),
        ("logprobs", -1),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", INF),
        ("temperature", NAN),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_parameters_that_mean_nothing_are_refused_by_name_value_and_constraint(name, value):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value!r}')} must be "):
        SamplingParams(**{name: value})


def test_only_allowed_tokens_are_sampled_whatever_their_logits():
    logits = random_logits(3, 30)
    allowed = frozenset({3, 5, 8})
    best = max(allowed, key=lambda token: logits[0, token].item())
    rows = [
        row_of("greedy", temperature=0, allowed_ids=allowed),
        row_of("biased", temperature=0, allowed_ids=allowed, logit_bias={8: 100.0}),
        row_of("free", temperature=0),
    ]
    before = logits.clone()
    assert sample(Sampler(), logits, rows) == [best, 8, logits[2].argmax().item()]
    assert torch.equal(logits, before)
    sampler = Sampler()
    drawn = {sample(sampler, logits[:1], [row_of("hot", temperature=5.0, allowed_ids=allowed)])[0] for _ in range(60)}
    assert drawn == allowed
    with pytest.raises(ValueError, match=r"allowed_ids=.* must be at least one token id"):
        SamplingParams(allowed_ids=frozenset())


def test_no_token_is_left_is_told_from_logits_that_are_not_finite():
    sampler = Sampler()
    impossible = {"allowed_ids": frozenset({3}), "bad_words": ((3,),)}
    rows = [row_of("impossible", **impossible), row_of("free"), row_of("poisoned", **impossible), row_of("NaN")]
    logits = torch.zeros(4, 10)
    logits[2, 5] = logits[3, 5] = NAN
    first, free, *others = sample(sampler, logits, rows)
    assert (first, others) == (None, [None, None])
    assert free is not None
    assert [sampler.has_ruled_out_all(row.request.id, row.index) for row in rows] == [True, False, False, False]
    assert sample(sampler, torch.zeros(1, 10), rows[1:2]) != [None]
    assert not sampler.has_ruled_out_all(rows[0].request.id, 0), "that was an earlier step"


def test_bad_words_are_not_completed():
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 4] = 2.0, 1.0
    words = {"temperature": 0, "bad_words": ((3,), (7, 8, 3))}
    assert sample(Sampler(), logits, [row_of("one token", **words)]) == [4]
    words = {"temperature": 0, "bad_words": ((7, 8, 3), (5, 4))}
    request = Request("several", (7, 8), SamplingParams(**words))
    for output, best in (([], 3), ([8], 3), ([7, 8], 4), ([7, 7, 8], 4), ([7, 8, 5], 3), ([7, 8, 1], 3)):
        sequence = Sequence(request, [*request.prompt, *output])
        assert sample(Sampler(), logits, [sequence]) == [best], f"after {output}"
    with pytest.raises(ValueError, match="bad_words"):
        SamplingParams(bad_words=((),))
