"""A model on N ranks computes what it computes on one: as DTensors and as local modules, whatever carries its sums."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.huggingface import HuggingFaceReader
from llama_tp.checkpoint.load import load_model
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.config import EngineConfig
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.launch import Group
from tests.distributed.parallel_worker import PLAN, PROMPTS, TOKENS
from tests.distributed.shares_worker import CASES, folder_of
from tests.distributed.torchrun import check, torchrun
from tests.tiny_checkpoint import params_of, write_meta
from tests.tiny_model import MODELS as META_MODELS
from tests.tiny_model import UNEVEN, VARIANTS, engine_of, random_model, transformers_twin

MODELS = {**META_MODELS, **VARIANTS, **UNEVEN}

ALONE = Group(comm=SingleComm(), device=torch.device("cpu"), mesh=None)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[2, 3, 4, 5, 7])
def ranks(request, tmp_path_factory):
    """(number of ranks, what its leader saved)."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, args in MODELS.items():
        if request.param > args.n_heads:
            continue
        if name in META_MODELS:
            # Fairscale splits evenly only; the sharding plan does not need that.
            divided = (args.vocab_size, args.n_heads, args.n_kv_heads, args.hidden_dim)
            num_shards = 1 if any(size % request.param for size in divided) else request.param
            write_checkpoint(folder / name, random_model(args), num_shards)
        else:
            write_variant(folder / name, random_model(args))
    check(torchrun(request.param, "tests.distributed.parallel_worker", str(folder)))
    return request.param, torch.load(folder / "results.pt")


@cache
def on_one_rank(name):
    """(logits, greedy tokens) of a single process."""
    logits = engine_of(random_model(MODELS[name])).runner.execute(PLAN)
    greedy = SamplingParams(max_new_tokens=16, temperature=0)
    completions = engine_of(random_model(MODELS[name])).generate(PROMPTS, greedy)
    return logits, [completion.token_ids for completion in completions]


@cache
def by_transformers(name):
    """Logits of the last token of PLAN, of the model that transformers computes."""
    return transformers_twin(random_model(MODELS[name]))(torch.tensor([TOKENS])).logits[0, -1]


def write_checkpoint(folder, model, num_shards):
    """A checkpoint as converted from as many of Meta's shards, cut as Fairscale cuts them."""
    originals = folder.with_name(folder.name + ".meta")
    params = params_of(model.args)
    write_meta(originals, unique_weights(model), num_shards, embedding_dim=0, params=params)
    save(FairscaleReader(originals, num_shards), folder)


def write_variant(folder, model):
    """A checkpoint as converted from what transformers saves."""
    originals = folder.with_name(folder.name + ".hf")
    transformers_twin(model).save_pretrained(originals)
    save(HuggingFaceReader(originals), folder)


def save(reader, folder):
    folder.mkdir()
    write_manifest(folder, known=dcp.save(reader, folder))


def unique_weights(model):
    weights = model.state_dict()
    if model.args.tied_embeddings:
        del weights["output.weight"]
    return weights


def test_every_model_whose_heads_allow_it_ran(ranks):
    size, results = ranks
    expected = {name for name, args in MODELS.items() if size <= args.n_heads}
    assert {name for name, _ in results} == expected
    assert len(expected) >= 4


def test_dtensors_local_modules_and_a_single_process_have_the_same_logits(ranks):
    _, results = ranks
    for (name, comm), result in results.items():
        single, _ = on_one_rank(name)
        torch.testing.assert_close(result["dtensor"], single, atol=1e-4, rtol=0, msg=f"dtensor form of {name}")
        torch.testing.assert_close(
            result["local"], single, atol=1e-4, rtol=0, msg=f"local modules of {name} over {comm}"
        )


def test_a_checkpoint_from_one_or_several_shards_loads_to_the_same_logits(ranks):
    _, results = ranks
    for (name, comm), result in results.items():
        single, _ = on_one_rank(name)
        torch.testing.assert_close(result["loaded"], single, atol=1e-4, rtol=0, msg=f"{name} ({comm})")


def test_what_transformers_saved_or_fairscale_cut_loads_to_the_logits_of_transformers(ranks):
    _, results = ranks
    for (name, comm), result in results.items():
        torch.testing.assert_close(
            result["loaded"][0], by_transformers(name), atol=1e-4, rtol=0, msg=f"{name} ({comm})"
        )


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_loads_all_of_them_to_the_logits_of_transformers(tmp_path, name):
    args = MODELS[name]
    if name in META_MODELS:
        write_checkpoint(tmp_path / "converted", random_model(args), 1)
    else:
        write_variant(tmp_path / "converted", random_model(args))
    model = load_model(str(tmp_path / "converted"), args, ALONE, torch.float32)
    config = EngineConfig(max_seq_len=128, max_batch_size=4)
    options = {"dtype": torch.float32, "device": ALONE.device, "num_kv_heads": args.n_kv_heads}
    logits = ModelRunner(model, config, **options).execute(PLAN)
    torch.testing.assert_close(logits[0], by_transformers(name), atol=1e-4, rtol=0)


def test_greedy_tokens_do_not_depend_on_the_number_of_ranks(ranks):
    _, results = ranks
    for (name, comm), result in results.items():
        _, single = on_one_rank(name)
        assert result["greedy"] == single, f"{name} over {comm}"


def test_prompts_are_scored_as_transformers_does(ranks):
    _, results = ranks
    for (name, comm), result in results.items():
        twin = transformers_twin(random_model(MODELS[name]))
        for prompt, scores in zip(PROMPTS, result["scores"], strict=True):
            with torch.no_grad():
                logs = twin(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
            expected = [logs[at, token].item() for at, token in enumerate(prompt[1:])]
            assert scores == pytest.approx(expected, abs=1e-4), f"{name} over {comm}"


@pytest.mark.parametrize("stage", ["dtype", "weights", "cache"])
def test_when_one_rank_cannot_load_all_ranks_hear_why_at_once(tmp_path, stage):
    """They used to wait an hour for it, in another collective than it was in."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, random_model(MODELS["mha"]), num_shards=1)
    MODELS["mha"].save(folder / "model_args.json")
    done = torchrun(2, "tests.distributed.failed_load_worker", str(folder), stage, timeout_s=60)
    check(done)
    assert sorted(done.stdout.splitlines()) == [
        f"rank {rank} heard: rank 1: OutOfMemoryError: CUDA out of memory" for rank in range(2)
    ]


def test_unequal_shares_give_the_logits_and_tokens_of_one_process(tmp_path):
    for name, shares in CASES:
        folder, model = tmp_path / folder_of(name, shares), random_model(MODELS[name])
        if name in VARIANTS:
            write_variant(folder, model)
        else:
            write_checkpoint(folder, model, num_shards=1)
    check(torchrun(3, "tests.distributed.shares_worker", str(tmp_path)))
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == CASES
    for (name, shares), (logits, greedy) in results.items():
        single, tokens = on_one_rank(name)
        torch.testing.assert_close(logits, single, atol=1e-4, rtol=0, msg=f"{name} in shares of {shares}")
        assert greedy == tokens, f"{name} in shares of {shares}"
