"""`llama-tp plan`: any model, any device, as a table, in detail, as JSON, and as a configuration that can be served."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from llama_tp.cli import planning
from llama_tp.model.published import PUBLISHED
from llama_tp.model_args import ModelArgs
from llama_tp.torchserve.config import ModelConfig
from tests.paths import CONFIGS
from tests.published_params import DEMO, LLAMA_2_7B, LLAMA_3_1_8B
from tests.tiny_gguf import write_gguf
from tests.tiny_huggingface import save, tiny_model


@pytest.fixture
def params(tmp_path):
    """Writes a params.json."""

    def write(text):
        path = tmp_path / "params.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


@pytest.fixture
def plan(run):
    """Runs the command, which must succeed, with --json; the parsed document."""

    def run_one(*argv):
        code, out, err = run("plan", *argv, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run_one


def why_refused(run, *argv):
    code, out, err = run("plan", *argv)
    assert (code, out) == (1, "")
    assert err.startswith("llama-tp: ")
    assert err.count("\n") == 1
    return err


def test_the_table_has_a_row_for_each_size_and_ends_with_a_recommendation(run, params):
    code, out, err = run("plan", params({**json.loads(LLAMA_3_1_8B), "max_seq_len": 8192}))
    assert (code, err) == (0, "")
    head, table, recommendation = out.strip().split("\n\n")
    assert "8.03 billion parameters, 32 query heads, 8 kv heads, bfloat16" in head
    _, columns, *rows = table.splitlines()
    assert "ranks" in columns
    assert len({len(line) for line in (columns, *rows)}) == 1, "columns are aligned"
    assert [row.split()[0] for row in rows] == [str(size) for size in range(1, 17)]
    # 8.03e9 * 2 bytes; 32 layers * (keys and values) * 8 heads * 128 * 2 bytes
    assert rows[0].split()[1:6] == ["15.0", "GiB", "1.00x", "128.0", "KiB"]
    assert rows[7].split()[4:6] == rows[15].split()[4:6] == ["16.0", "KiB"]  # one kv head, and a copy of it
    assert rows[2].split()[4:6] == ["48.0", "KiB"]  # three of eight
    assert len(recommendation.splitlines()) == 1


def test_one_size_is_described_in_detail(run):
    code, out, err = run("plan", "--model", "llama2-70b", "--tp", "8", "--max-batch-size", "16")
    assert (code, err) == (0, "")
    lines = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert lines["weights"] == "16.1 GiB, of which a step reads 16.0 GiB"
    assert lines["KV cache"] == "2.5 GiB, 40 KiB per token"
    assert lines["all-reduces"] == "161 per step, of 16 KiB per token"
    assert lines["total"].endswith(" of 80.0 GiB: fits")
    batches = [line.split()[0] for line in out.splitlines() if line.endswith("reading")]
    assert batches == ["1", "8", "16", "32"]


def test_auto_describes_the_recommended_size(plan):
    assert [row["ranks"] for row in plan("llama2-70b", "--tp=auto")["sizes"]] == [3]


def test_no_more_ranks_than_a_model_has_heads_or_was_asked_for(plan, run, params):
    found = plan(params({**json.loads(DEMO), "tied_embeddings": True}))
    assert [row["ranks"] for row in found["sizes"]] == list(range(1, 10))
    assert len(plan(params(DEMO), "--max_ranks", "2")["sizes"]) == 2
    assert [row["ranks"] for row in plan("llama3.1-405b", "--tp", "24")["sizes"]] == [24]
    assert "tensor_parallel_size=33 exceeds n_heads=32" in why_refused(run, "llama2-7b", "--tp=33")


def test_memory_and_bandwidth_replace_those_of_the_device(plan):
    usual, small, slow = (
        plan("llama2-7b", "--tp=1", *more)["sizes"][0] for more in ([], ["--memory=24GiB"], ["--bandwidth=300"])
    )
    assert (usual["memory"], small["memory"]) == (80 * 2**30, 24 * 2**30)
    assert small["tokens"] < usual["tokens"] / 5
    assert slow["steps"][0]["reading_s"] == pytest.approx(slow["steps"][0]["bytes_read"] / 300e9)


def test_a_wider_dtype_takes_twice_the_memory(plan, params):
    half, full = (plan(params(DEMO), "--dtype", one, "--tp=1")["sizes"][0] for one in ("bfloat16", "float32"))
    assert full["weights"] == 2 * half["weights"]
    assert full["kv_cache_per_token"] == 2 * half["kv_cache_per_token"]


def test_a_published_name_is_its_architecture(plan):
    found = plan("qwen2.5-7b", "--max-seq-len=1024", "--context=100")
    assert found["args"] == PUBLISHED["qwen2.5-7b"].to_dict()
    assert (found["max_seq_len"], found["context"]) == (1024, 100)
    assert found["parameters"] == 7_615_616_512


def test_a_checkpoint_of_any_format_is_opened(plan, tmp_path, capsys):
    folder = save(tiny_model("llama, tied"), tmp_path / "tied")
    capsys.readouterr()
    hugging_face = plan(str(folder))
    assert hugging_face["dtype"] == "float32"
    assert hugging_face["args"]["tied_embeddings"]
    write_gguf(tmp_path / "a.gguf")
    assert [row["ranks"] for row in plan(str(tmp_path / "a.gguf"), "--tp=1")["sizes"]] == [1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["llama2-8b"], "model='llama2-8b' is not a published model; did you mean llama2-7b? known: "),
        (["llama2-7b", "--device=h10"], "device='h10' is not in the table of devices; did you mean h100? known: "),
        (["llama2-7b", "--dtype=int8"], "dtype='int8' must be one of auto, bfloat16, float16, float32"),
        (["llama2-7b", "--memory=0.9"], "memory='0.9' must be a size such as 24GiB"),
        (["llama2-7b", "--memory=many"], "memory='many' must be bytes"),
        (["llama2-7b", "--bandwidth=fast"], "bandwidth='fast' must be a number of GB/s above 0"),
        (["llama2-7b", "--max_ranks=0"], "max_ranks=0 must be an integer of at least 1"),
        (["llama2-7b", "--max-batch-size=2.5"], "max_batch_size=2.5 must be an integer of at least 1"),
        (["llama2-7b", "--context=9999"], "context=9999 must be at most max_seq_len=4096"),
        (["llama2-7b", "--tp=all"], "tp='all' must be an integer, or auto"),
        (["llama2-7b", "--json=yes"], "json='yes' must be True or False, or have no value"),
        (["llama2-70b", "--device=l4", "--max-ranks=4", "--tp=auto"], "nor with one; use devices with more memory"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(run, argv, words):
    assert words in why_refused(run, *argv)


def test_a_vocabulary_that_params_json_leaves_open_is_not_guessed(run, params):
    """It counted the two vocabularies as -1 row each, and said 6.48 billion for a model of 6.74."""
    assert "vocab_size" in why_refused(run, params(LLAMA_2_7B))


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("llama2-7b", ["--max-batch-size=8"]),
        ("llama2-70b", ["--tp=5", "--max-seq-len=2048"]),
        ("llama3.1-8b", ["--device=l4", "--max-batch-size=600"]),
        ("qwen2.5-7b", ["--device=a10", "--dtype=float16"]),
        ("smollm2-135m", ["--device=cpu", "--tp=2", "--max-batch-size=4", "--max-seq-len=512"]),
    ],
)
def test_the_configuration_that_is_written_is_one_that_can_be_served(run, plan, tmp_path, name, argv, monkeypatch):
    path = tmp_path / "model-config.yaml"
    monkeypatch.setattr("llama_tp.threads.available_cores", lambda: 6)
    code, out, err = run("plan", name, *argv, "--json", "--write", str(path))
    assert (code, err.startswith(f"Wrote {path} for ")) == (0, True)
    found = json.loads(out)
    config = ModelConfig.load(path)
    engine = config.engine_config(PUBLISHED[name])
    ranks = found["recommended"] if len(found["sizes"]) > 1 else found["sizes"][0]["ranks"]
    is_cpu = "--device=cpu" in argv
    assert config.torchrun.nproc_per_node == ranks
    threads = config.torchrun.OMP_NUMBER_THREADS
    assert threads == (3 if is_cpu else 1)
    assert config.deviceType == ("cpu" if is_cpu else "gpu")
    assert config.batchSize == engine.max_batch_size == found["max_batch_size"]
    assert engine.max_seq_len == found["max_seq_len"]
    assert engine.dtype == found["dtype"]
    assert config.handler.max_batched_tokens >= engine.max_batch_size
    assert config.handler.tokenizer_path == ("tokenizer.model" if "llama" in name else "tokenizer.json")
    assert engine.kv_cache_memory == ("30MiB" if is_cpu else 0.9)  # 4 * 512 tokens, 2 kv heads on the busiest rank


def test_the_comments_of_the_shipped_configuration_stay(run, tmp_path):
    path = tmp_path / "model-config.yaml"
    run("plan", "llama3.1-70b", "--write", str(path))
    title, *written = path.read_text().splitlines()
    _, *shipped = (CONFIGS / "llama2-7b.yaml").read_text().splitlines()
    assert title.startswith("# Configuration of TorchServe and the handler for llama3.1-70b on ")
    assert [line.partition("#")[2] for line in written] == [line.partition("#")[2] for line in shipped]
    assert [line.partition(":")[0] for line in written] == [line.partition(":")[0] for line in shipped]


def test_an_existing_file_is_overwritten_only_on_request(run, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    code, _, err = run("plan", "llama2-7b", "--write", str(path))
    assert code == 1
    assert "exists already; pass --overwrite to replace it" in err
    assert path.read_text() == "mine"
    assert run("plan", "llama2-7b", "--write", str(path), "--overwrite")[0] == 0
    assert ModelConfig.load(path).torchrun.nproc_per_node == 2


def test_no_configuration_is_written_for_a_model_that_does_not_fit(run, tmp_path):
    path = tmp_path / "model-config.yaml"
    code, _, err = run("plan", "llama2-70b", "--tp=1", "--write", str(path))
    assert code == 1
    assert "tp=1 h100 cannot hold one request of max_seq_len=4096" in err
    assert not path.exists()


def test_the_tokenizer_beside_a_checkpoint_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert planning._tokenizer_name(str(tmp_path)) == "tokenizer.json"
    ModelArgs.from_params(json.loads(DEMO)).save(tmp_path / "model_args.json")
    assert planning._tokenizer_name(str(tmp_path / "model_args.json")) == "tokenizer.json"


def cpu_s_of(*command):
    """CPU time of a process, and what it has printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def test_405b_is_planned_within_two_seconds_without_torch():
    """Of CPU time, the best of three; longer where the command takes long to say its version, which is some 0.1 s."""
    command = ["-X", "importtime", "-m", "llama_tp", "plan", "llama3.1-405b", "--max-ranks=32"]
    seconds, (done, *_) = zip(*(cpu_s_of(*command) for _ in range(3)), strict=True)
    to_start, _ = cpu_s_of("-m", "llama_tp", "--version")
    assert min(seconds) < max(2, 15 * to_start)
    assert "405.85 billion parameters" in done.stdout
    assert " torch\n" not in done.stderr


def test_no_speed_is_given_for_a_batch_that_does_not_fit(run):
    _, out, _ = run("plan", "llama2-7b", "--device=l4", "--max-ranks=1")
    row = next(line for line in out.splitlines() if line.split()[:1] == ["1"])
    assert row.split()[-2:] == ["-", "-"]  # 8 and 32 times 2,048 tokens, in 15,928
    assert "does not fit" in run("plan", "llama2-7b", "--device=l4", "--tp=1")[1]


def test_unequal_shares_are_listed_by_rank_and_written(run, tmp_path):
    path = tmp_path / "model-config.yaml"
    code, out, _ = run("plan", "llama2-70b", "--tp-shares", "24,24,16", "--write", str(path))
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("     ") and "KiB" in line]
    assert [row[1:3] for row in rows] == [["24", "3"], ["24", "3"], ["16", "2"]]
    engine = ModelConfig.load(path).engine_config(PUBLISHED["llama2-70b"])
    assert engine.tp_shares == (24, 24, 16)
    assert ModelConfig.load(path).torchrun.nproc_per_node == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tp-shares=24,24,15"], "tp_shares=[24, 24, 15] adds up to 63, but must add up to n_heads=64"),
        (["--tp-shares=64"], "tp_shares=64 must be the query heads of each rank, such as 24,24,16"),
        (["--tp-shares=32,half"], "must be the query heads of each rank"),
        (["--tp-shares=32,32", "--tp=4"], "tp=4, but tp_shares has 2 shares; leave --tp out"),
    ],
)
def test_shares_that_cannot_be_are_refused(run, argv, words):
    assert words in why_refused(run, "llama2-70b", *argv)
