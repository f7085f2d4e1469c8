"""lm_eval scores its tasks through v1/completions as it would with transformers, in float32."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.torchserve_rig import TorchServe, package, serve
from tests.paths import ROOT

if not os.environ.get("CI"):
    pytest.importorskip("lm_eval")

pytestmark = pytest.mark.e2e

TASK = ROOT / "examples" / "lm_eval" / "capitals.jsonl"


@pytest.fixture(scope="module")
def server(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    work = tmp_path_factory.mktemp("model")
    converted = demo_folder / "converted_checkpoints"
    shutil.copytree(converted, work / "converted_checkpoints")
    shutil.copy(converted / "tokenizer.json", work / "tokenizer.model")  # `package` expects it; it is not used
    shutil.copy(converted / "model_args.json", work)
    handler = {"tokenizer_path": "converted_checkpoints", "kv_cache_memory": "256MiB", "dtype": "float32"}
    store = package(work, handler=handler)
    with serve(store, tmp_path_factory.mktemp("torchserve")) as running:
        yield running


def evaluate(server: TorchServe, tokenizer: Path, work: Path, *arguments: str) -> dict[int, list[list[float | bool]]]:
    """By document: the log likelihood of each choice, and whether it is what greedy search finds."""
    url = f"http://127.0.0.1:{server.inference_port}/predictions/llama/1.0/v1/completions"
    model_args = f"model=llama,base_url={url},tokenizer={tokenizer},tokenizer_backend=huggingface,num_concurrent=1"
    command = ["-m", "lm_eval", "--include_path", "examples/lm_eval", "--tasks", "capitals"]
    command += ["--model", "local-completions", "--model_args", model_args]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "cache")}
    done = subprocess.run(
        [sys.executable, *command, "--output_path", str(work), "--log_samples", *arguments],
        cwd=ROOT,
        env={**os.environ, **offline, "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = work.rglob("samples_capitals_*.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    return {record["doc_id"]: [pair[0] for pair in record["resps"]] for record in records}


def by_transformers(demo_in_transformers: tuple[Any, Any]) -> dict[int, list[tuple[float, bool]]]:
    """The same, by teacher forcing."""
    model, tokenizer = demo_in_transformers
    torch.set_num_threads(1)  # several would wait for each other where others compute, too
    found = {}
    for index, line in enumerate(TASK.read_text().splitlines()):
        document = json.loads(line)
        context = tokenizer(f"The capital of {document['country']} is the city of").input_ids
        found[index] = []
        for city in document["cities"]:
            answer = tokenizer(f" {city}").input_ids
            with torch.inference_mode():
                logs = model(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
            at = range(len(context) - 1, len(context) + len(answer) - 1)
            value = sum(logs[position, token].item() for position, token in zip(at, answer, strict=True))
            is_greedy = all(logs[position].argmax().item() == token for position, token in zip(at, answer, strict=True))
            found[index].append((value, is_greedy))
    return found


def test_log_likelihoods_are_those_of_transformers(
    server: TorchServe, demo_folder: Path, demo_in_transformers: tuple[Any, Any], tmp_path: Path
) -> None:
    """With four prompts a request."""
    found = evaluate(server, demo_folder / "converted_checkpoints", tmp_path, "--batch_size", "4")
    expected = by_transformers(demo_in_transformers)
    assert len(found) == len(expected) == 16
    for index, pairs in expected.items():
        assert [float(value) for value, _ in found[index]] == pytest.approx([value for value, _ in pairs], abs=1e-3)
        assert [str(is_greedy) for _, is_greedy in found[index]] == [str(is_greedy) for _, is_greedy in pairs]
    assert any(is_greedy for pairs in expected.values() for _, is_greedy in pairs)
