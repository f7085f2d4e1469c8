"""`llama-tp bench compare`: contenders in processes of their own, whatever becomes of them, and which rounds count."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from llama_tp.bench.compare.command import Contestant, Settings, _play
from llama_tp.bench.compare.engines import Work
from llama_tp.bench.compare.gguf_forms import is_in_form, write_in_form
from llama_tp.bench.compare.llama_cpp_peer import LlamaCpp
from llama_tp.bench.compare.openvino_peer import OpenVino
from llama_tp.bench.compare.process import ContenderFailed, ContenderProcess
from llama_tp.bench.compare.rounds import Round, chosen, counting, needs_another
from llama_tp.bench.compare.spec import DEFAULT, Spec, parse_specs
from llama_tp.bench.compare.table import Result, show
from llama_tp.bench.contenders import Timing
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.cli.bench_compare import compare
from llama_tp.model_args import ModelArgs
from tests.paths import ROOT
from tests.tiny_gguf import META_TO_GGUF, write_gguf
from tests.waiting import PATIENCE_S, wait_until

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=160, ffn_hidden_dim=96)
ILL = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"


@pytest.fixture
def process(tmp_path):
    """Starts a contender's process that runs a program instead of the worker; ends it at last."""
    started = []

    def start(program, limit_s=PATIENCE_S):
        command = [sys.executable, "-c", textwrap.dedent(program)]
        started.append(ContenderProcess(os.environ, tmp_path / "log", limit_s, command))
        return started[-1]

    yield start
    for one in started:
        one.close()


ANSWERING = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    answer = {"version": "1.0"}
    if request["do"] == "run":
        answer = {"prefill_s": 1, "decode_s": 2, "decoded": 3, "steps_s": [1, 1], "first_tokens": [7]}
    print(json.dumps(answer), flush=True)
"""


def state_of(process):
    return Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_contender_is_asked_line_by_line_and_stopped_in_between(process):
    contender = process(ANSWERING)
    assert contender.load("any", {}) == "1.0"
    timing = contender.run([[1]], 4)
    assert (timing.decoded, timing.steps_s, timing.first_tokens) == (3, (1, 1), (7,))
    assert wait_until(lambda: state_of(contender) == "T")
    assert contender.cpu_s >= 0


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (ILL, "died with SIGILL while loading"),
        ("import sys\nprint('warning', file=sys.stderr)\nsys.exit('no AVX')", "exited with 1 while loading: no AVX"),
        ("import time\ntime.sleep(60)", "gave no answer for 0.5 s while loading"),
        ('input()\nprint(\'{"error": "too large"}\', flush=True)\ninput()', "while loading: too large"),
    ],
)
def test_a_contender_that_fails_is_gone_and_its_reason_is_one_line(process, program, words):
    contender = process(program, limit_s=0.5 if "sleep" in program else PATIENCE_S)
    with pytest.raises(ContenderFailed, match=f"^{words}$"):
        contender.load("any", {})
    assert contender._process.returncode is not None


def test_a_contender_may_fail_later(process):
    contender = process('input()\nprint(\'{"version": "1"}\', flush=True)\ninput()\n' + ILL)
    contender.load("any", {})
    with pytest.raises(ContenderFailed, match="died with SIGILL at batch 2"):
        contender.run([[1], [2]], 4)


@pytest.fixture
def crashing_llama_cpp(tmp_path, monkeypatch):
    """A llama-cpp-python whose import is an illegal instruction, as on some machines."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "llama_cpp.py").write_text(ILL)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), str(ROOT)]))


def test_all_contenders_generate_the_same_from_one_file_and_one_that_crashes_does_not_stop_the_rest(
    tmp_path, capsys, crashing_llama_cpp
):
    write_gguf(tmp_path / "model.gguf", layers=1)
    compare(
        str(tmp_path / "model.gguf"),
        contenders="llama_tp float32,llama.cpp Q4_1,transformers float32",
        batch=(1, 2),
        context=12,
        prompt=24,
        new=6,
        rounds=1,
        repeats=0,
        threads=1,
    )
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    ours, llama_cpp, theirs = document["contenders"]
    assert ours["failure"] is theirs["failure"] is None
    assert len(ours["first_tokens"]) == 6
    assert ours["first_tokens"] == theirs["first_tokens"]
    assert llama_cpp["failure"] == "died with SIGILL while loading"
    rows = [" ".join(line.split()) for line in captured.out.splitlines()]
    assert "llama.cpp Q4_1 died with SIGILL while loading" in rows
    cases = ["decode B=1", "decode B=2", "prefill 24"]
    assert list(ours["tokens_per_s"]["idle"]) == cases
    assert [(one["ours"], one["theirs"], one["case"]) for one in document["ratios"]] == [
        ("llama_tp float32", "transformers float32", case) for case in cases
    ]
    assert len(document["rounds"]) == 1
    assert document["rounds"][0]["load_average"] >= 0


def test_rounds_in_which_others_worked_more_than_in_the_calmest_do_not_count():
    calm, busy = Round(1.0, 0.1), Round(3.0, 0.9)
    assert counting([busy, busy, busy], 3) == [0, 1, 2]  # always the same: nothing is better
    assert counting([calm, busy, calm], 3) == [0, 2]
    assert needs_another([calm], 3, 0)
    assert not needs_another([busy, busy, busy], 3, 9)
    assert needs_another([busy, calm, busy], 3, 2)
    assert not needs_another([busy, calm, busy, busy, busy], 3, 2)
    assert not needs_another([busy, calm, calm, calm], 3, 2)
    assert chosen([busy, calm, calm, calm], 3) == [1, 2, 3]
    assert len(chosen([busy, calm, busy], 2)) == 2


def result(name, rates, *, is_ours=False, failure=None):
    by_round = {} if failure else {"idle": {"decode B=1": rates}}
    medians = {} if failure else {"idle": {"decode B=1": sorted(rates)[len(rates) // 2]}}
    return Result(name, is_ours, "1", failure, medians, by_round, ())


class Silent:
    """A contender's process that remembers what it was asked."""

    cpu_s = 0.0

    def __init__(self):
        self.runs = []

    def run(self, prompts, new):
        self.runs.append((prompts, new))
        return Timing(1.0, 1.0, len(prompts) * (new - 1))


def test_contenders_get_the_same_prompts_and_never_one_that_they_have_seen():
    """Beside a busy process, the prompts were those of before, which our prefix cache had: prefill seemed 38 times as
    fast."""
    settings = Settings(
        batches=[1, 2], context=8, prompt=16, new=4, rounds=2, repeats=0, threads=1, limit_s=9, neighbour=True
    )
    contestants = [Contestant(Spec("llama_tp", "bf16"), Silent()), Contestant(Spec("transformers", "bf16"), Silent())]
    rounds, rates = _play(contestants, 1000, settings)
    one, other = (contestant.process.runs for contestant in contestants)
    assert one == other
    prompts = [tuple(prompt) for run, _ in one for prompt in run]
    assert len(prompts) == len(set(prompts)) == 3 * 2 * (1 + 2 + 1)  # rounds, one to warm up; conditions; cases
    assert [(len(run), new) for run, new in one[:6]] == [(1, 4), (1, 4), (2, 4), (2, 4), (1, 2), (1, 2)]
    assert len(rounds) == len(rates) == 2
    assert rates[0]["llama_tp bf16", "decode B=2", "beside"] == 2 * 3
    assert rates[0]["llama_tp bf16", "prefill 16", "idle"] == 16


def test_a_ratio_is_the_median_of_those_of_each_round(capsys):
    """Not the ratio of medians: the machine's speed may differ between rounds."""
    results = [
        result("llama_tp bf16", [10, 40, 30], is_ours=True),
        result("a", [5, 10, 30]),
        result("b", [], failure="died with SIGILL while loading"),
    ]
    rounds = [Round(0, 0)] * 3
    (ratio,) = show(results, ["decode B=1"], rounds, [0, 1, 2])
    assert (ratio.ours, ratio.theirs, ratio.ratio) == ("llama_tp bf16", "a", 2)
    assert "died with SIGILL" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["bf16", "Q8_0", "Q4_1"])
def test_a_file_in_another_form_has_the_same_model_and_nearly_the_same_weights(tmp_path, form):
    expected = write_gguf(tmp_path / "model.gguf")
    write_in_form(tmp_path / "model.gguf", tmp_path / "other.gguf", form)
    assert is_in_form(tmp_path / "other.gguf", form)
    one, other = (open_checkpoint(tmp_path / name, keep_quantized=False) for name in ("model.gguf", "other.gguf"))
    assert one.args == other.args
    names = {field.name for field in gguf.GGUFReader(tmp_path / "other.gguf").fields.values()}
    assert names == {field.name for field in gguf.GGUFReader(tmp_path / "model.gguf").fields.values()}
    for name, tensor in expected.items():
        found = gguf_values(tmp_path / "other.gguf", name)
        tolerance = {"bf16": 2**-8, "Q8_0": 2**-6, "Q4_1": 0.2}[form] * tensor.abs().max().item()
        assert torch.allclose(found, tensor, atol=tolerance, rtol=0), name


def gguf_values(path, name):
    theirs = f"{META_TO_GGUF[name.removesuffix('.weight')][0]}.weight"
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == theirs)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


class FakeLlamaCpp:
    """The part of llama.cpp's C API that is used: the next token is the sum of all tokens of a sequence so far."""

    VOCAB = 50

    def __init__(self):
        self.sequences = {}
        self.calls = []

    def __getattr__(self, name):
        if name.endswith("_params"):
            return SimpleNamespace
        return lambda *_: object()  # handles

    def llama_vocab_n_tokens(self, _vocab):
        return self.VOCAB

    def llama_batch_init(self, count, _embedding, _sequences):
        rows = [[0] for _ in range(count)]
        return SimpleNamespace(
            n_tokens=0, token=[0] * count, pos=[0] * count, n_seq_id=[0] * count, seq_id=rows, logits=[0] * count
        )

    def llama_memory_clear(self, _memory, _data):
        self.sequences = {}

    def llama_decode(self, _context, batch):
        self.calls.append(batch.n_tokens)
        self.sums = {}
        for index in range(batch.n_tokens):
            tokens = self.sequences.setdefault(batch.seq_id[index][0], [])
            assert batch.pos[index] == len(tokens)
            tokens.append(batch.token[index])
            if batch.logits[index]:
                self.sums[index] = sum(tokens) % self.VOCAB
        return 0

    def llama_get_logits_ith(self, _context, index):
        values = np.zeros(self.VOCAB, dtype=np.float32)
        values[self.sums[index]] = 1
        self.kept = values
        return values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_gets_every_prompt_in_pieces_and_then_one_token_of_each_sequence(monkeypatch):
    library = FakeLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    contender = LlamaCpp(Work(form="Q4_1", threads=1, batch=2, prompt=600, new=3, path="any"))
    timing = contender.run([[1] * 600, [2] * 600], 3)
    assert library.calls == [512, 88, 512, 88, 2, 2]
    assert timing.first_tokens == (600 % 50, 600 % 50, 600 % 50)  # sums of 600, then of 600 + 0 = 600 ...
    assert library.sequences[1][600:] == [1200 % 50, 1200 % 50]
    assert (timing.decoded, len(timing.steps_s)) == (4, 2)


def fake_openvino(num_steps):
    raw = SimpleNamespace(
        m_new_token_times=[1000.0 + 20 * step for step in range(num_steps)], m_times_to_first_token=[250_000.0]
    )
    seen = {}

    class Pipeline:
        def __init__(self, path, device, **properties):
            seen.update(path=path, device=device, **properties)

        def generate(self, inputs, config):
            seen.update(shape=inputs.ids.shape, new=config.max_new_tokens, ignores_eos=config.ignore_eos)
            return SimpleNamespace(perf_metrics=SimpleNamespace(raw_metrics=raw), tokens=[[5, 6, 7], [8, 9, 1]])

    module = SimpleNamespace(
        LLMPipeline=Pipeline,
        GenerationConfig=SimpleNamespace,
        TokenizedInputs=lambda ids, mask: SimpleNamespace(ids=ids, mask=mask),
    )
    return module, seen


def test_openvino_times_steps_of_the_whole_batch(monkeypatch):
    module, seen = fake_openvino(3)
    monkeypatch.setitem(sys.modules, "openvino_genai", module)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda values: values))
    contender = OpenVino(Work(form="Q4_1", threads=2, batch=2, prompt=4, new=3, path="file"))
    timing = contender.run([[1, 2], [3, 4]], 3)
    assert timing.prefill_s == 0.25
    assert timing.steps_s == pytest.approx((0.02, 0.02))
    assert (timing.decode_s, timing.decoded) == (pytest.approx(0.04), 4)
    assert timing.first_tokens == (5, 6, 7)
    assert seen == {
        "path": "file", "device": "CPU", "INFERENCE_NUM_THREADS": 2, "shape": (2, 2), "new": 3, "ignores_eos": True
    }  # fmt: skip
    with pytest.raises(ValueError, match="made 3 steps instead of 4"):
        contender.run([[1, 2], [3, 4]], 4)


def test_the_default_contenders_exist():
    assert [spec.name for spec in parse_specs(DEFAULT)] == DEFAULT.split(",")
    assert parse_specs("llama_tp int4, llama.cpp Q4_1,llama_tp int4") == [
        Spec("llama_tp", "int4"),
        Spec("llama.cpp", "Q4_1"),
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contenders": "vllm bf16"}, r"'vllm bf16' is unknown; known: llama_tp bf16\|int8\|int4\|float32;"),
        ({"contenders": "transformers bf16"}, "must include one of llama_tp's"),
        ({"random_weights": True}, "random_weights needs --model"),
        ({"model": "llama2-7b"}, "model='llama2-7b' is for random weights"),
        (
            {"random_weights": True, "model": "llama2-7b", "contenders": "llama_tp bf16,openvino Q4_1"},
            "openvino Q4_1 cannot have random weights",
        ),
        ({"batch": 0}, "batch=0 must be integers of at least 1"),
        ({"rounds": 0}, "rounds=0 must be an integer of at least 1"),
        ({"limit_s": 0}, "limit_s=0 must be a number of seconds above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        compare(**settings)
