"""The compiled kernels compute what eager PyTorch does, for every architecture, weight format and layout of a step."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model.cpu.attention import max_tokens
from llama_tp.model.cpu.build import build_kernels
from llama_tp.model.cpu.kernels import Kernels
from llama_tp.model.cpu.linear import KernelLinear, WidenedLinear
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.quantization import QuantizedWeight, dequantize, quantize
from llama_tp.model.weights import STORED
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.apply import localize
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.compiled import CompiledTransformer
from tests.tiny_model import MODELS, UNEVEN, VARIANTS, compiled_runner_of, kernels, random_model, runner_of

ALL = {**MODELS, **VARIANTS, **UNEVEN}
CONFIG = EngineConfig(max_seq_len=128, max_batch_size=8, page_size=4)


class Sequences:
    """Plans for some sequences, in pages that lie anywhere."""

    def __init__(self, config: EngineConfig, vocab_size: int, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.config = config
        self.vocab_size = vocab_size
        self.lengths = [0] * config.max_batch_size
        self.free = list(range(config.num_pages))
        self.random.shuffle(self.free)
        self.num_pages = [0] * config.max_batch_size

    def step(self, *counts: int, num_logits: int | None = None) -> StepPlan:
        """So many tokens for each row."""
        chunks, updates = [], []
        for row, count in enumerate(counts):
            if count == 0:
                continue
            start = self.lengths[row]
            self.lengths[row] += count
            while self.num_pages[row] * self.config.page_size < self.lengths[row]:
                updates.append((row, self.num_pages[row], self.free.pop()))
                self.num_pages[row] += 1
            tokens = tuple(self.random.choices(range(self.vocab_size), k=count))
            chunks.append(Chunk(row, start, tokens, count if num_logits is None else num_logits))
        return StepPlan(1, tuple(chunks), tuple(updates))


def logits_of(runner, plans):
    return [logits.clone() for plan in plans if (logits := runner.execute(plan)) is not None]


def plans_for(args, config=CONFIG):
    sequences = Sequences(config, args.vocab_size)
    return [
        sequences.step(5, 0, 3),  # prompts
        sequences.step(1, 7, 1),  # a prompt beside decodes
        sequences.step(1),
        sequences.step(40, 1, 1),  # more than the kernels compute as a whole
        sequences.step(*[2] * 8),
        sequences.step(1, 1, 1, 1, 1, 1, 1, 1),
        sequences.step(0, 16),
        sequences.step(0, 0, 0, 12, 12, 12, 12, 12),  # a product of many tokens in a whole step
        sequences.step(4, 20, 20, 20, 20),  # more than the kernels compute as a whole in bfloat16
    ]


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_eager_pytorch(any_kernels, name):
    model = random_model(ALL[name])
    plans = plans_for(model.args)
    expected = logits_of(runner_of(model, CONFIG), plans)
    actual = logits_of(compiled_runner_of(model, CONFIG, chosen=any_kernels), plans)
    assert max(plan_tokens(plan) for plan in plans) > max_tokens(torch.float32)
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def plan_tokens(plan):
    return sum(len(chunk.tokens) for chunk in plan.chunks)


def assert_as_close_to_float32_as_eager(model, config, plans):
    """In bfloat16."""
    exact = logits_of(runner_of(model, config), plans)
    error = {}
    for make in (runner_of, compiled_runner_of):
        logits = logits_of(make(model, config, dtype=torch.bfloat16), plans)
        error[make] = torch.cat([(one - two).abs().flatten() for one, two in zip(logits, exact, strict=True)]).mean()
    assert error[compiled_runner_of] < 1.1 * error[runner_of]


@pytest.mark.parametrize("name", ["gqa", "biases everywhere", "head norms, wide heads"])
def test_in_bfloat16_logits_are_as_close_to_float32_as_eager_pytorchs(name):
    model = random_model(ALL[name])
    assert_as_close_to_float32_as_eager(model, CONFIG, plans_for(model.args))


@pytest.mark.parametrize("head_dim", [32, 64, 72, 96, 160])
def test_in_bfloat16_long_prompts_are_as_close_to_float32_as_eager_pytorchs(head_dim):
    """Their attention is computed in tiles, if heads have a multiple of 32 numbers."""
    config = EngineConfig(max_seq_len=1200, max_batch_size=3, max_batched_tokens=1024, page_size=16)
    model = random_model(
        ModelArgs(
            dim=96, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=128, multiple_of=32, attention_head_dim=head_dim
        )
    )
    with torch.no_grad():  # attention that prefers some keys, and matters
        for layer in model.layers:
            layer.attention.wq.weight *= 4
            layer.attention.wo.weight *= 4
    sequences = Sequences(config, model.args.vocab_size)
    plans = [
        sequences.step(70, 0, 5),
        sequences.step(13, 500, 0),
        sequences.step(1, 531, 3),  # crosses the 512th and the 1024th key
        sequences.step(300, 20, 1),
    ]
    assert_as_close_to_float32_as_eager(model, config, plans)


def test_only_steps_of_many_tokens_run_layer_by_layer(monkeypatch):
    model = random_model(MODELS["gqa"])
    runner = compiled_runner_of(model, CONFIG)
    layered, by_layers = [], runner.model._by_layers
    monkeypatch.setattr(runner.model, "_by_layers", lambda x, *rest: layered.append(len(x)) or by_layers(x, *rest))
    sequences = Sequences(CONFIG, model.args.vocab_size)
    runner.execute(sequences.step(*[2] * 8))
    assert not layered
    runner.execute(sequences.step(max_tokens(torch.float32) + 1))
    assert layered == [max_tokens(torch.float32) + 1]


def test_a_model_of_more_layers_than_the_kernels_can_count_is_left_as_it_is():
    model = random_model(ModelArgs(dim=32, n_layers=410, n_heads=1, n_kv_heads=1, vocab_size=32, multiple_of=32))
    cache = KVCache(
        n_layers=410, num_pages=2, page_size=4, num_kv_heads=1, head_dim=32, dtype=torch.bfloat16, device="cpu"
    )
    local = localize(model.bfloat16(), SingleComm(), layout=STORED)
    layers = list(local.modules())
    with pytest.raises(RuntimeError, match="too large"):
        CompiledTransformer(local, cache, kernels(), max_seq_len=8, deterministic=False)
    assert list(local.modules()) == layers


def test_contexts_of_several_parts_are_merged():
    """Attention is computed in parts of 512 keys."""
    config = EngineConfig(max_seq_len=2048, max_batch_size=2, max_batched_tokens=1024, page_size=16)
    model = random_model(MODELS["gqa"])
    sequences = Sequences(config, model.args.vocab_size)
    plans = [
        sequences.step(505, 1020, num_logits=1),
        sequences.step(1, 1),
        sequences.step(8, 8),  # crosses the 512th and the 1024th key
        sequences.step(900, num_logits=1),
        sequences.step(1, 1),
    ]
    expected = logits_of(runner_of(model, config), plans)
    for one, two in zip(logits_of(compiled_runner_of(model, config), plans), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gqa", "tied", "linear rope scaling, narrow heads"])
def test_in_deterministic_mode_logits_do_not_depend_on_the_rest_of_the_step(name, dtype):
    config = EngineConfig(max_seq_len=128, max_batch_size=8, page_size=4, deterministic=True)
    model = random_model(ALL[name])
    tokens = tuple(random.Random(1).choices(range(model.args.vocab_size), k=40))
    pages = tuple((0, index, index) for index in range(10))
    alone = compiled_runner_of(model, config, dtype=dtype)
    plan = StepPlan(1, (Chunk(0, 0, tokens, len(tokens)),), pages)
    together = compiled_runner_of(model, config, dtype=dtype, num_threads=3)
    (expected,) = logits_of(alone, [plan])
    found = []
    for start in range(40):  # one by one, beside another sequence's prompt
        others = Chunk(1, 2 * start, tokens[:2], 0)
        updates = tuple(page for page in pages if page[1] * 4 == start)
        updates += tuple((1, index, 20 + index) for index in range(20) if index * 2 == start)
        found += logits_of(together, [StepPlan(1, (Chunk(0, start, tokens[start : start + 1], 1), others), updates)])
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_changes_nothing(num_threads):
    model = random_model(MODELS["gqa"])
    plans = plans_for(model.args)
    expected = logits_of(compiled_runner_of(model, CONFIG), plans)
    actual = logits_of(compiled_runner_of(model, CONFIG, num_threads=num_threads), plans)
    for plan, one, two in zip(plans, actual, expected, strict=True):
        assert plan_tokens(plan) > max_tokens(torch.float32) or torch.equal(one, two)


@pytest.mark.parametrize("num_tokens", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_sequence_with_non_finite_states_spoils_no_other(value, dtype, num_tokens):
    model = random_model(VARIANTS["head norms, wide heads"])  # of 32 numbers: attention in tiles
    with torch.no_grad():
        model.tok_embeddings.weight[7] = value
    runners = [compiled_runner_of(model, CONFIG, dtype=dtype) for _ in range(2)]
    good = Chunk(1, 0, tuple(index % 7 for index in range(num_tokens)), 1)
    updates = ((0, 0, 0), *((1, index, 1 + index) for index in range(18)))
    (expected,), (found,) = (
        logits_of(runner, [StepPlan(1, (Chunk(0, 0, (1, token, 2), 3), good), updates)])
        for runner, token in zip(runners, (6, 7), strict=True)
    )
    assert torch.equal(found[[0, 3]], expected[[0, 3]])
    assert not found[1].isfinite().any()
    assert found[2, 0].isnan()  # it depends on the token before, which the first logit tells
    assert found[2, 1:].isfinite().all()
    assert all(runner.cache.memory().isfinite().all() for runner in runners)


@pytest.mark.parametrize("name", ["mha", "tied"])
def test_greedy_tokens_are_those_of_eager_pytorch(name):
    model = random_model(MODELS[name])
    prompts = [[1, 2, 3], list(range(4, 60)), [9]]
    params = SamplingParams(max_new_tokens=40, temperature=0)
    eager, compiled = (
        Engine(make(model, CONFIG), SingleComm(), CONFIG).generate(prompts, params)
        for make in (runner_of, compiled_runner_of)
    )
    assert [one.token_ids for one in compiled] == [one.token_ids for one in eager]


SHAPES = [(8, 32), (1, 64), (37, 96), (300, 576), (16, 1088), (23, 1600), (60, 2080)]


@pytest.fixture(scope="module", params=["native", "avx2"])
def any_kernels(request):
    """Of this machine, and as they are compiled on one that only has AVX2."""
    if request.param == "native":
        return kernels()
    build = build_kernels("-mno-avx512f")
    path = build.wait()
    assert path is not None, build.error
    return Kernels(path, 2)


FORMS = ["float32", "bfloat16", "int8", "int8_groups", "int4", "int4, float32 offsets"]


def weight_of(form, rows, columns):
    torch.manual_seed(rows + columns)
    weight = torch.randn(rows, columns)
    if form in ("float32", "bfloat16"):
        return weight.to(getattr(torch, form))
    quantized = quantize(weight, form.partition(",")[0])
    if "," in form:
        quantized = QuantizedWeight(quantized.weight, quantized.scales, quantized.offsets.float() * 1.001)
    return quantized


def dense(weight):
    return dequantize(weight, torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_the_dense_matrix(any_kernels, form, shape):
    weight = weight_of(form, *shape)
    bias = torch.randn(shape[0])
    for num_tokens in (1, 2, 3, 4, 5, 8, 16, 24, 64):
        x = torch.randn(num_tokens, shape[1])
        expected = x @ dense(weight).t() + bias
        exact = any_kernels.multiply(weight, bias, x, may_round=False)
        torch.testing.assert_close(exact, expected, rtol=1e-4, atol=2e-4)
        rounded = any_kernels.multiply(weight, bias, x, may_round=True)
        error = (rounded - expected).abs().max() / expected.abs().mean()
        assert error < 0.06, num_tokens  # two roundings to 8 bits in each product: the largest of thousands


@pytest.mark.parametrize("columns", [6, 31, 33, 65, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_product_may_have_any_number_of_columns(any_kernels, columns, dtype):
    torch.manual_seed(columns)
    weight = torch.randn(13, columns).to(dtype)
    for num_tokens, may_round in product((1, 3, 9), (False, True)):
        x = torch.randn(num_tokens, columns)
        y = any_kernels.multiply(weight, None, x.bfloat16().float(), may_round=may_round)
        torch.testing.assert_close(y, x.bfloat16().float() @ weight.float().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS[2:])
def test_many_tokens_are_multiplied_with_widened_weights(any_kernels, form):
    weight = weight_of(form, 300, 576)
    x = torch.randn(40, 576).bfloat16()
    bias = torch.randn(300).bfloat16()
    layer = WidenedLinear(weight, bias, any_kernels)
    expected = torch.nn.functional.linear(x, dense(weight).bfloat16(), bias)
    torch.testing.assert_close(layer(x), expected, rtol=0.01, atol=0.1)
    wide = torch.empty(300, 576, dtype=torch.bfloat16)
    any_kernels.widen(layer._struct, slice(0, 300), wide)
    assert torch.equal(wide, dequantize(weight, torch.bfloat16))


def layer_for_many_tokens(weight, bias=None):
    if not kernels().multiplies_batches(weight):
        pytest.skip("this CPU has no instructions for such products, or better ones that PyTorch uses")
    return KernelLinear(weight, bias, kernels())


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("shape", [(300, 576), (48, 32), (7, 96), (100, 1088)])
def test_many_tokens_are_multiplied_with_weights_as_they_are_stored(form, shape):
    weight = weight_of(form, *shape)
    bias = torch.randn(shape[0]).bfloat16()
    layer = layer_for_many_tokens(weight, bias)
    for num_tokens in (1, 5, 8, 64, 79):
        x = torch.randn(num_tokens, shape[1]).bfloat16()
        expected = x.float() @ dense(weight).bfloat16().float().t() + bias.float()
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.05 * shape[1] ** 0.5)
    assert torch.equal(layer.dense_weight().float(), dense(weight))


def rounded_to_8_bits(matrix):
    """With a float32 scale for every 64 columns of a row."""
    blocks = matrix.float().split(64, dim=1)
    rounded = []
    for block in blocks:
        most, largest_code = block.abs().amax(dim=1, keepdim=True), torch.tensor(127.0)
        rounded.append((block.double() * (largest_code / most)).round() * (most / largest_code))
    return torch.cat(rounded, dim=1)


@pytest.mark.parametrize("form", FORMS[2:])
@pytest.mark.parametrize("shape", [(300, 576), (48, 32), (7, 96), (100, 1088)])
def test_quantized_weights_are_multiplied_with_many_tokens_as_8_bit_integers(form, shape):
    """Exactly: only the result, in bfloat16, is rounded again."""
    weight = weight_of(form, *shape)
    layer = layer_for_many_tokens(weight)
    as_integers = dense(weight) if form == "int8" else rounded_to_8_bits(dense(weight).bfloat16())
    for num_tokens in (17, 64, 79):
        x = torch.randn(num_tokens, shape[1]).bfloat16()
        x[0, 5] = 100.0  # costs the rest of its block precision, and no other
        expected = rounded_to_8_bits(x) @ as_integers.double().t()
        torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_product_of_many_tokens_is_not_finite_for_one_with_an_input_that_is_not(form, value):
    layer = layer_for_many_tokens(weight_of(form, 13, 96))
    x = torch.randn(30, 96).bfloat16()
    clean = layer(x)
    for column in (0, 40, 95):
        spoilt = x.clone()
        spoilt[7, column] = value
        y = layer(spoilt)
        assert not y[7].isfinite().any()
        y[7] = clean[7]
        assert torch.equal(y, clean)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [1e-45, 1e-39, 1e-37, 1e30])
def test_products_of_tiny_and_of_huge_inputs_are_finite(any_kernels, form, value):
    """Products of quantized weights divide by the largest input of a group of columns."""
    weight = weight_of(form, 13, 96)
    for num_tokens in (1, 5, 64):
        x = torch.full((num_tokens, 96), value)
        expected = x.double() @ dense(weight).double().t()
        error = (any_kernels.multiply(weight, None, x, may_round=True) - expected).abs().max()
        assert error < 0.05 * expected.abs().max() + 1e-35  # NaN is not less


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_product_is_not_finite_for_a_token_with_an_input_that_is_not(any_kernels, form, value):
    weight = weight_of(form, 13, 96)
    for num_tokens, column in product((1, 3, 9, 17, 64), (0, 40, 95)):
        x = torch.randn(num_tokens, 96)
        clean = any_kernels.multiply(weight, None, x, may_round=True)
        x[-1, column] = value
        y = any_kernels.multiply(weight, None, x, may_round=True)
        assert not y[-1].isfinite().any()
        assert torch.equal(y[:-1], clean[:-1])


class Float32Sums(SingleComm):
    """A group whose sums are float32, as those of SharedMemoryComm are, whatever is added up."""

    def all_reduce(self, x):
        return x.float()


def test_sums_over_ranks_may_be_float32_in_bfloat16():
    model = random_model(MODELS["gqa"])
    plans = plans_for(model.args)
    usual, other = (
        compiled_runner_of(model, CONFIG, dtype=torch.bfloat16, comm=comm()) for comm in (SingleComm, Float32Sums)
    )
    for one, two in zip(logits_of(usual, plans), logits_of(other, plans), strict=True):
        torch.testing.assert_close(one, two, rtol=0.02, atol=0.05)
