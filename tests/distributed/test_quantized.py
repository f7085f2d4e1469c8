"""Quantized models on N ranks: written as by one process, and computing what one process computes."""

from __future__ import annotations

import pytest
import torch

from llama_tp.checkpoint.formats.quantized import num_bytes, parameters_of
from llama_tp.checkpoint.store.stored import MODEL_ARGS, StoredReader
from tests.distributed.torchrun import check, torchrun
from tests.tiny_gguf import write_model
from tests.tiny_huggingface import save, tiny_model
from tests.tiny_quantized import convert_to, outputs_of, quantize_folder

pytestmark = pytest.mark.distributed

NAMES = ("int8", "int4", "gguf", "awq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("quantized")
    dense = save(tiny_model("llama, groups of 128"), folder / "dense")
    for form in ("int8", "int4"):
        convert_to(dense, folder / form, quantize=form)
    write_model(folder / "a.gguf", tiny_model("qwen3, groups"), kind="Q4_1")
    convert_to(folder / "a.gguf", folder / "gguf", dtype="float32")
    save(tiny_model("qwen2, groups"), folder / "packed", torch.float16)
    quantize_folder(folder / "packed", "awq", 64)
    convert_to(folder / "packed", folder / "awq", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def on_one_rank(folder):
    return {name: outputs_of(folder / name) for name in NAMES}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_logits_and_greedy_tokens_do_not_depend_on_the_number_of_ranks(folder, on_one_rank, tmp_path, ranks):
    check(torchrun(ranks, "tests.distributed.quantized_worker", str(folder), str(tmp_path / "results.pt"), *NAMES))
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == set(NAMES)
    for name, (logits, greedy, held) in results.items():
        expected_logits, expected_greedy = on_one_rank[name]
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0, msg=f"{name} on {ranks} ranks")
        assert greedy == expected_greedy, f"{name} on {ranks} ranks"
        assert 0 < held < 0.7 * num_bytes(StoredReader(folder / name)), "a rank holds its share, quantized"


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_two_ranks_quantize_to_the_bits_of_one_process(folder, tmp_path, form):
    options = ["--quantize", form, "--workers", "2", "--tokenizer", str(folder / "int8.tokenizer")]
    done = torchrun(2, "llama_tp", "convert", str(folder / "dense"), str(tmp_path / "converted"), *options)
    check(done)
    assert done.stdout.count("Wrote") == 1
    assert len(list((tmp_path / "converted").glob("*.distcp"))) == 2
    assert (tmp_path / "converted" / MODEL_ARGS).read_bytes() == (folder / form / MODEL_ARGS).read_bytes()
    expected, found = (parameters_of(StoredReader(one)) for one in (folder / form, tmp_path / "converted"))
    assert found.keys() == expected.keys()
    for name, source in expected.items():
        assert torch.equal(found[name].read(0, 0, source.shape[0]), source.read(0, 0, source.shape[0])), name
