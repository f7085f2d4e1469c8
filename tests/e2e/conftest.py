"""Fixtures that several end-to-end tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_tp.checkpoint.demo import extract_gguf, make_demo
from llama_tp.text import Tokenizer, load_tokenizer
from tests.e2e.torchserve_rig import TorchServe, package_demo, serve


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llama-tp demo` makes, with weights/ and converted_checkpoints/: a real model. Not to be written to."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder)
    return folder


@pytest.fixture(scope="session")
def demo_server(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A server of the demo's model in float32, with 8 slots."""
    store = package_demo(demo_folder, tmp_path_factory.mktemp("model"))
    with serve(store, tmp_path_factory.mktemp("torchserve")) as running:
        yield running


@pytest.fixture(scope="session")
def demo_tokenizer(demo_folder: Path) -> Tokenizer:
    return load_tokenizer(demo_folder / "converted_checkpoints")


@pytest.fixture(scope="session")
def demo_in_transformers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """transformers' model of the demo's publisher's file, in float32, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    import torch  # most tests here do without it

    folder = tmp_path_factory.mktemp("gguf")
    gguf = extract_gguf(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16).float()  # as in the shards
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
