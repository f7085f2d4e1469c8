"""model-config.yaml: those that we ship fit their models, and what is wrong with one is said before it costs time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from llama_tp.config_error import ConfigError
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.model_args import ModelArgs
from llama_tp.torchserve.config import HandlerSection, ModelConfig, TorchrunSection
from tests.paths import CONFIGS, ROOT
from tests.published_params import DEMO, LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, LLAMA_3_1_8B
from tests.unit.problems import problems_of

SHIPPED = {
    "model-config.yaml": (LLAMA_2_7B, 1),
    "configs/llama2-7b.yaml": (LLAMA_2_7B, 1),
    "configs/llama2-13b.yaml": (LLAMA_2_13B, 2),
    "configs/llama2-70b.yaml": (LLAMA_2_70B, 8),
    "configs/llama3.1-8b.yaml": (LLAMA_3_1_8B, 1),
    "configs/demo-cpu.yaml": (DEMO, 2),
}
TINY = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=100, max_seq_len=300, max_batch_size=4)


@pytest.fixture
def values():
    """A parsed configuration that is in order."""
    return yaml.safe_load((ROOT / "model-config.yaml").read_text())


def test_every_configuration_that_is_shipped_is_tested_here():
    models = {f"configs/{path.name}" for path in CONFIGS.glob("*.yaml")} - {"configs/metrics.yaml"}
    assert models | {"model-config.yaml"} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_fits_its_model(name):
    params, ranks = SHIPPED[name]
    config = ModelConfig.load(ROOT / name)
    engine = config.engine_config(ModelArgs.from_params(json.loads(params)))
    assert config.torchrun.nnodes * config.torchrun.nproc_per_node == ranks
    assert engine.max_batch_size == config.handler.max_batch_size == config.batchSize
    assert engine.max_seq_len == config.handler.max_seq_len
    assert engine.device == ("cpu" if "cpu" in name else "cuda")
    assert (engine.collective_timeout_s, engine.heartbeat_s) == (20, 2)


@pytest.mark.parametrize("name", ["config.properties", "config.production.properties"])
def test_what_is_shipped_for_the_frontend_keeps_every_address_on_this_host(name):
    lines = (CONFIGS / name).read_text().splitlines()
    addresses = dict(line.split("=") for line in lines if "_address=" in line)
    assert {"grpc_inference_address", "grpc_management_address"} <= addresses.keys()
    assert {address.removeprefix("http://").partition(":")[0] for address in addresses.values()} == {"127.0.0.1"}


EXPLAINED_BY_NAME_OR_NEIGHBOUR = {"model_args_path", "top_p", "min_p", "presence_penalty", "frequency_penalty"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_sets_every_key_of_the_handler_with_a_comment(name):
    lines = (ROOT / name).read_text().splitlines()
    for key in HandlerSection.model_fields:
        (line,) = [line for line in lines if line.strip().startswith(f"{key}:")]
        if key not in (
            "model_args_path",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
        ):  # these are explained by their neighbours or their names
            assert "#" in line, key


def test_the_default_configuration_sets_every_key_that_the_frontend_reads(values):
    optional = {"deviceIds"}  # by default TorchServe hands out the GPUs
    assert ModelConfig.model_fields.keys() - values.keys() == optional
    aliases = {field.alias or name for name, field in TorchrunSection.model_fields.items()}
    assert aliases - values["torchrun"].keys() == {"nnodes", "rdzv-backend"}  # of interest with several hosts only


def test_what_the_default_configuration_sets_is_what_a_request_gets_by_default(values):
    sampling = {"temperature": 0.25, "top_p": 0.5, "top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5}
    sampling |= {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    assert list(sampling) == [knob.name for knob in KNOBS]
    values["handler"].update(max_new_tokens=7, manual_seed=11, mode="chat", **sampling)
    defaults = ModelConfig.of(values).request_defaults(published=dict.fromkeys(sampling, 0))
    assert (defaults.mode, defaults.max_new_tokens, defaults.seed) == ("chat", 7, 11)
    assert defaults.sampling == sampling
    assert defaults.configured == {"max_new_tokens", *sampling}


def test_the_model_s_own_limits_hold_where_the_handler_sets_none(values):
    values["handler"].update(max_seq_len=None, max_batch_size=None)
    engine = ModelConfig.of({**values, "batchSize": 4}).engine_config(TINY)
    assert (engine.max_seq_len, engine.max_batch_size) == (300, 4)


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("handler", "max_seq_length", "max_seq_len"),
        ("handler", "temprature", "temperature"),
        ("handler", "converted_checkpoint_dir", "converted_ckpt_dir"),
        ("torchrun", "nproc_per_node", "nproc-per-node"),
        (None, "batchsize", "batchSize"),
        (None, "maxbatchdelay", "maxBatchDelay"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_one_that_was_meant(values, section, key, meant):
    (values[section] if section else values)[key] = 1
    (problem,) = problems_of(ModelConfig.of, values)
    path = f"{section}.{key}" if section else key
    assert problem == f"{path} is not a known key; did you mean {meant}?"


def test_a_key_that_resembles_nothing_is_answered_with_all_that_are_known(values):
    values["handler"]["zzz"] = 1
    (problem,) = problems_of(ModelConfig.of, values)
    assert all(key in problem for key in HandlerSection.model_fields)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("asyncCommunication", "rank 0"),
        ("useJobTicket", "no effect"),
        ("clientTimeoutInMills", "hanging"),
        ("sequenceBatching", "continuousBatching"),
        ("parallelLevel", "nproc-per-node"),
        ("useVenv", "Python"),
    ],
)
def test_a_key_of_torchserve_s_that_breaks_us_is_refused_with_the_reason(values, key, reason):
    (problem,) = problems_of(ModelConfig.of, {**values, key: True})
    assert problem.startswith(f"{key} must not be set")
    assert reason in problem
    assert "remove it" in problem


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "batchSize", "16"),
        (None, "batchSize", 0),
        (None, "batchSize", True),
        (None, "batchSize", 1.5),
        (None, "maxBatchDelay", 0),
        (None, "responseTimeout", None),
        (None, "minWorkers", 2),
        (None, "maxWorkers", 0),
        (None, "deviceType", "tpu"),
        (None, "parallelType", "pp"),
        (None, "continuousBatching", False),
        (None, "jobQueueSize", -1),
        (None, "deviceIds", "0"),
        (None, "handler", 5),
        (None, "handler", None),
        (None, "torchrun", []),
        ("torchrun", "nproc-per-node", 0),
        ("torchrun", "nproc-per-node", "gpu"),
        ("torchrun", "OMP_NUMBER_THREADS", 0),
        ("handler", "converted_ckpt_dir", None),
        ("handler", "tokenizer_path", 1),
        ("handler", "mode", "completion"),
        ("handler", "chat_format", "llama"),
        ("handler", "max_seq_len", 0),
        ("handler", "max_seq_len", "4096"),
        ("handler", "max_new_tokens", 0),
        ("handler", "temperature", -0.1),
        ("handler", "temperature", "0.6"),
        ("handler", "temperature", True),
        ("handler", "temperature", float("nan")),
        ("handler", "top_p", 0),
        ("handler", "top_p", 1.1),
        ("handler", "top_k", -1),
        ("handler", "min_p", 2),
        ("handler", "manual_seed", -1),
        ("handler", "manual_seed", 2**63),
        ("handler", "manual_seed", "42"),
        ("handler", "dtype", "int8"),
        ("handler", "collective_timeout_s", 0),
        ("handler", "abandon_after_s", -1),
        ("handler", "heartbeat_s", "2s"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(values, section, key, value):
    (values[section] if section else values)[key] = value
    (problem,) = problems_of(ModelConfig.of, values)
    path = f"{section}.{key}" if section else key
    assert problem.startswith(f"{path}={json.dumps(value)}: "), problem
    assert not any(word in problem for word in ("None", "True", "False")), problem


@pytest.mark.parametrize("key", ["deviceType", "parallelType", "continuousBatching", "torchrun", "handler"])
def test_a_missing_section_is_named(values, key):
    del values[key]
    assert problems_of(ModelConfig.of, values) == [f"{key} is missing"]


@pytest.mark.parametrize(
    ("section", "key"),
    [("torchrun", "nproc-per-node"), ("handler", "converted_ckpt_dir"), ("handler", "tokenizer_path")],
)
def test_a_missing_key_of_a_section_is_named(values, section, key):
    del values[section][key]
    assert problems_of(ModelConfig.of, values) == [f"{section}.{key} is missing"]


def test_several_problems_are_said_at_once(values):
    values["useJobTicket"] = True
    values["batchSize"] = "many"
    values["handler"]["top_p"] = 2
    values["torchrun"]["nprocs"] = 8
    problems = problems_of(ModelConfig.of, values)
    assert len(problems) == 4
    for word in ("useJobTicket", "batchSize", "handler.top_p", "torchrun.nprocs"):
        assert any(problem.startswith(word) for problem in problems), word


def test_settings_that_contradict_each_other_are_all_named(values):
    values["responseTimeout"] = 20
    values["handler"]["heartbeat_s"] = 30
    values["torchrun"]["rdzv-endpoint"] = ""
    assert [problem.split("=")[0].split(" ")[0] for problem in problems_of(ModelConfig.of, values)] == [
        "responseTimeout",
        "handler.heartbeat_s",
        "torchrun.rdzv-endpoint",
    ]


def test_the_ranks_must_notice_a_lost_peer_before_torchserve_gives_up(values):
    values["responseTimeout"], values["handler"]["collective_timeout_s"] = 60, 60
    (problem,) = problems_of(ModelConfig.of, values)
    assert "responseTimeout=60" in problem
    assert "handler.collective_timeout_s=60" in problem
    values["handler"]["collective_timeout_s"] = 59.5
    ModelConfig.of(values)


def test_more_requests_than_the_engine_runs_at_once_are_refused(values):
    values["batchSize"], values["handler"]["max_batch_size"] = 5, 4
    with pytest.raises(ConfigError, match=r"^batchSize=5 exceeds handler.max_batch_size=4: "):
        ModelConfig.of(values).engine_config(TINY)
    values["batchSize"] = 4
    assert ModelConfig.of(values).engine_config(TINY).max_batch_size == 4


def test_more_ranks_than_heads_are_refused(values):
    values["torchrun"].update({"nproc-per-node": 3, "nnodes": 2, "rdzv-endpoint": "first:29500"})
    with pytest.raises(ConfigError, match=r"size 6 exceeds n_heads=4: .*any size from 1 to 4$"):
        ModelConfig.of({**values, "batchSize": 4}).engine_config(TINY)


def test_a_context_that_the_model_is_not_computed_for_is_refused(values):
    model = dataclasses.replace(TINY, context_limit=512)
    values["handler"]["max_seq_len"] = 513
    with pytest.raises(ConfigError, match=r"^handler.max_seq_len=513 must be at most context_limit=512"):
        ModelConfig.of({**values, "batchSize": 4}).engine_config(model)
    values["handler"]["max_seq_len"] = 512
    assert ModelConfig.of({**values, "batchSize": 4}).engine_config(model).max_seq_len == 512


def test_what_does_not_fit_the_model_is_said_at_once(values):
    values["torchrun"]["nproc-per-node"] = 5
    values["handler"]["max_batch_size"] = 1
    with pytest.raises(ConfigError) as caught:
        ModelConfig.of({**values, "batchSize": 2}).engine_config(TINY)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "", "just words", "42"], ids=["list", "empty", "words", "number"])
def test_yaml_that_is_no_mapping_is_refused(text, tmp_path):
    (tmp_path / "model-config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="must be a mapping"):
        ModelConfig.load(tmp_path / "model-config.yaml")


@pytest.mark.parametrize(
    "content", [b"handler: [1, 2", b"a: b: c", b"\xff\xfe\x00", b"a: !!python/object:os.system x", b"a: \x07"], ids=str
)
def test_a_file_that_is_not_yaml_is_named_in_one_line(content, tmp_path):
    path = tmp_path / "model-config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.load(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path} is not a YAML file")
    assert "\n" not in problem


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.load(tmp_path / "model-config.yaml")


def test_a_key_that_is_not_a_string_is_refused(values):
    assert "1" in problems_of(ModelConfig.of, {**values, 1: 2})[0]


def test_the_documentation_names_every_key_of_the_handler_section():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert [key for key in HandlerSection.model_fields if f"`{key}`" not in page] == []


@pytest.mark.parametrize("memory", ["6GiB", "512 MiB", 0.9, 2**33, None])
def test_the_cache_can_be_sized_by_memory(values, memory):
    values["handler"]["kv_cache_memory"] = memory
    assert ModelConfig.of(values).engine_config(TINY).kv_cache_memory == memory


@pytest.mark.parametrize("memory", ["much", 0, -5, "0GiB"])
def test_a_cache_of_no_size_is_named(values, memory):
    values["handler"]["kv_cache_memory"] = memory
    (problem,) = problems_of(ModelConfig.of, values)
    assert problem.startswith(f"handler.kv_cache_memory={json.dumps(memory)} must be bytes (6442450944, ")


def test_what_the_engine_is_told_is_what_the_file_says(values):
    values["handler"] |= {"max_waiting": 7, "deterministic": True, "prefix_cache": False, "page_size": 32}
    values["handler"] |= {"verify_checkpoint": "always", "compile": False}
    values["handler"] |= {"speculative_tokens": 3, "speculative_max_batch": 5}
    engine = ModelConfig.of(values).engine_config(TINY)
    assert (engine.max_waiting, engine.deterministic, engine.prefix_cache, engine.page_size) == (7, True, False, 32)
    assert (engine.verify_checkpoint, engine.compile) == ("always", False)
    assert (engine.speculative_tokens, engine.speculative_max_batch) == (3, 5)


@pytest.mark.parametrize("value", ["auto", True, False])
def test_kernels_may_be_compiled_or_not(values, value):
    values["handler"]["compile"] = value
    assert ModelConfig.of(values).engine_config(TINY).compile is value


@pytest.mark.parametrize("value", ["true", 2, None])
def test_another_value_of_compile_is_named_with_those_that_there_are(values, value):
    values["handler"]["compile"] = value
    (problem,) = problems_of(ModelConfig.of, values)
    assert problem == f'handler.compile={json.dumps(value)}: input should be "auto", true or false'


def test_every_key_of_the_handler_is_in_the_documentation():
    page = (ROOT / "docs/configuration.md").read_text()
    table = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert not [key for key in HandlerSection.model_fields if f"`{key}`" not in table]


@pytest.mark.parametrize(
    ("shares", "reason"),
    [
        ([3, 1], None),
        (None, None),
        (
            [2, 1, 1],
            "handler.tp_shares=[2, 1, 1] has 3 shares, but torchrun starts 2 ranks; give each rank its query heads",
        ),
        ([2, 1], "handler.tp_shares=[2, 1] adds up to 3, but must add up to n_heads=4"),
    ],
)
def test_unequal_shares_are_one_for_each_rank_and_cover_the_heads(values, shares, reason):
    values["torchrun"]["nproc-per-node"] = 2
    values["handler"].update(max_seq_len=100, max_batch_size=32, tp_shares=shares)
    config = ModelConfig.of(values)
    if reason is None:
        assert config.engine_config(TINY).tp_shares == (None if shares is None else tuple(shares))
    else:
        assert problems_of(config.engine_config, TINY) == [reason]


def test_a_share_of_no_heads_is_refused(values):
    values["handler"]["tp_shares"] = [4, 0]
    (problem,) = problems_of(ModelConfig.of, values)
    assert problem.startswith("handler.tp_shares.1=0: ")


@pytest.mark.parametrize("name", ["", "two words", "ключ", "a\nb", "x" * 201])
def test_a_name_that_clients_cannot_send_is_refused(values, name):
    values["handler"]["served_model_name"] = name
    (problem,) = problems_of(ModelConfig.of, values)
    assert problem.startswith("handler.served_model_name=")
    assert "\n" not in problem
