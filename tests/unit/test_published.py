"""Published models by name have the parameters and the architecture that their publishers give."""

from __future__ import annotations

import json

import pytest

from llama_tp.model.published import PUBLISHED, published
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import num_parameters_of_rank
from tests import published_params

PARAMETERS = {
    # Hugging Face hub, "parameters" of each model's safetensors
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(name):
    assert num_parameters_of_rank(PUBLISHED[name], 1, 0) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama2-7b", published_params.LLAMA_2_7B),
        ("llama2-13b", published_params.LLAMA_2_13B),
        ("llama2-70b", published_params.LLAMA_2_70B),
        ("llama3.1-8b", published_params.LLAMA_3_1_8B),
        ("llama3.1-70b", published_params.LLAMA_3_1_70B),
        ("llama3.1-405b", published_params.LLAMA_3_1_405B),
        ("llama3.2-1b", published_params.LLAMA_3_2_1B),
        ("llama3.2-3b", published_params.LLAMA_3_2_3B),
    ],
)
def test_a_model_of_metas_is_that_of_its_params_json(name, params):
    args, meta = PUBLISHED[name], ModelArgs.from_params(json.loads(params))
    assert args.hidden_dim == meta.hidden_dim
    own = {"vocab_size", "multiple_of", "ffn_dim_multiplier", "ffn_hidden_dim", "max_seq_len", "tied_embeddings"}
    assert {key: value for key, value in args.to_dict().items() if key not in own} == {
        key: value for key, value in meta.to_dict().items() if key not in own
    }


def test_a_misspelled_name_is_refused_with_the_closest_one():
    with pytest.raises(
        ValueError, match=r"^model='Llama2-70B' is not a published model; did you mean llama2-70b\? kno"
    ):
        published("Llama2-70B")
