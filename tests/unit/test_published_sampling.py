"""The publisher's sampling defaults, and what goes before them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llama_tp.engine.sampling_params import KNOBS
from llama_tp.torchserve.config import ModelConfig
from llama_tp.torchserve.published_sampling import published_sampling

QWEN = {"do_sample": True, "eos_token_id": [1, 2], "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20.0}


def write(folder: Path, config: object) -> Path:
    (folder / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "tokenizer.json").touch()
    return folder


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_a_publisher_s_values_are_read_next_to_the_tokenizer(tmp_path: Path, name: str) -> None:
    found = published_sampling(write(tmp_path, QWEN) / name)
    assert found == {"repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20}
    assert type(found["top_k"]) is int
    assert published_sampling(tmp_path / "elsewhere" / "tokenizer.json") == {}


@pytest.mark.parametrize(
    ("value", "used"), [(-1, 0), (0, 0), (40, 40), (-2, None), (1.5, None), ("5", None), (True, None)]
)
def test_top_k_is_used_if_a_request_could_have_it(tmp_path: Path, caplog: Any, value: object, used: int | None) -> None:
    found = published_sampling(write(tmp_path, {"top_k": value, "top_p": None}))
    assert found == ({} if used is None else {"top_k": used})
    assert ("top_k=" in caplog.text) == (used is None)


@pytest.mark.parametrize("value", [1e999, -1, 2.5, [1]])
def test_a_value_out_of_range_is_left_out_and_logged(tmp_path: Path, caplog: Any, value: object) -> None:
    assert published_sampling(write(tmp_path, {"temperature": value, "top_p": 0.5})) == {"top_p": 0.5}
    assert "must be a number in [0, 2]" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{", "\0"])
def test_a_damaged_file_is_logged_and_not_used(tmp_path: Path, caplog: Any, content: str) -> None:
    caplog.set_level(logging.WARNING)
    assert published_sampling(write(tmp_path, content)) == {}
    assert "generation_config.json" in caplog.text


def model_config(**handler: object) -> ModelConfig:
    paths = {"converted_ckpt_dir": "converted", "tokenizer_path": "tokenizer.json"}
    frontend = {"deviceType": "cpu", "parallelType": "tp", "continuousBatching": True}
    torchrun = {"nproc-per-node": 1, "rdzv-endpoint": "localhost:0"}
    return ModelConfig.of({**frontend, "torchrun": torchrun, "handler": {**paths, **handler}})


def test_the_configuration_goes_before_the_publisher_and_the_publisher_before_our_defaults() -> None:
    defaults = model_config(temperature=0.1, max_new_tokens=5).request_defaults({"temperature": 0.7, "top_k": 20})
    sampling = {knob.name: knob.default for knob in KNOBS} | {"temperature": 0.1, "top_p": 0.9, "top_k": 20}
    assert defaults.sampling == sampling
    assert defaults.configured == {"temperature", "max_new_tokens", "top_k"}
    assert model_config().request_defaults({}).configured == frozenset()
