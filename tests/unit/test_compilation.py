"""When an engine switches to the compiled kernels, and what it does without them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from llama_tp.config import EngineConfig
from llama_tp.engine import compilation
from llama_tp.engine.compilation import Compilation
from llama_tp.engine.engine import Engine
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.model.cpu.build import build_kernels
from llama_tp.model.linear import DenseLinear, is_packed
from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import Layout
from llama_tp.parallel.apply import localize
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.compiled import CompiledTransformer
from tests.tiny_model import MODELS, random_model, runner_of

CPU = torch.device("cpu")
MODEL = random_model(MODELS["gqa"])
PARAMS = SamplingParams(max_new_tokens=12, temperature=0)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]


class FakeBuild:
    """A Build whose end the test decides."""

    def __init__(self, *ends: Path | str | None) -> None:
        """ends: paths, errors, or None while it compiles; one for each time that it is started."""
        self.error: str | None = None
        self.discarded: list[str] = []
        self._ends = list(ends)
        self._path: Path | None = None

    def end(self) -> None:
        end = self._ends.pop(0)
        if isinstance(end, str):
            self.error = end
        self._path = end if isinstance(end, Path) else None

    def library(self) -> Path | None:
        return self._path

    def wait(self, timeout_s: float | None = None) -> Path | None:
        if self._path is None and self.error is None:
            self.end()
        return self._path

    def discard(self, reason: str) -> None:
        self.discarded.append(reason)
        self._path = None


@pytest.fixture(scope="module")
def library() -> Path:
    path = build_kernels().wait()
    assert path is not None
    return path


def engine_with(build: FakeBuild, **settings: object) -> Engine:
    config = EngineConfig(**{"max_seq_len": 64, "max_batch_size": 4, **settings})  # type: ignore[arg-type]
    waiting = Compilation(build, config)  # type: ignore[arg-type]
    runner = runner_for(config, waiting.layout)
    waiting.begin(runner)
    return Engine(runner, SingleComm(), config)


def runner_for(config: EngineConfig, layout: Layout) -> ModelRunner:
    twin = Transformer(MODEL.args).requires_grad_(False)
    twin.load_state_dict(MODEL.state_dict())
    return ModelRunner(
        localize(twin, SingleComm(), layout=layout),
        config,
        num_kv_heads=MODEL.args.n_kv_heads,
        dtype=torch.float32,
        device=CPU,
    )


def tokens_of(engine: Engine) -> list[list[int]]:
    return [one.token_ids for one in engine.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    config = EngineConfig(max_seq_len=64, max_batch_size=4)
    return tokens_of(Engine(runner_of(MODEL, config), SingleComm(), config))


def layers_of(engine: Engine) -> list[DenseLinear]:
    return [module for module in engine.runner.model.modules() if isinstance(module, DenseLinear)]


def test_kernels_in_the_cache_compute_from_the_first_step(library, expected):
    build = FakeBuild(library)
    build.end()
    engine = engine_with(build)
    assert isinstance(engine.runner.model, CompiledTransformer)
    assert tokens_of(engine) == expected


def test_requests_that_run_continue_when_the_kernels_take_over(library, expected, caplog):
    caplog.set_level(logging.INFO)
    build = FakeBuild(library)
    engine = engine_with(build)
    steps = []

    step = engine.runner.execute

    def execute(plan):
        steps.append(isinstance(engine.runner.model, CompiledTransformer))
        if len(steps) == 5:
            build.end()
        return step(plan)

    engine.runner.execute = execute  # type: ignore[method-assign]
    assert tokens_of(engine) == expected
    assert steps[:5] == [False] * 5
    assert all(steps[5:])
    assert caplog.messages == [f"compiled kernels compute ({library})"]


def test_after_a_failure_of_the_compiler_pytorch_computes_with_its_own_layout(expected, caplog):
    build = FakeBuild("kernels cannot be compiled: it is Thursday")
    engine = engine_with(build)
    assert all(layer.stored() is not None for layer in layers_of(engine))
    build.end()
    assert tokens_of(engine) == expected
    assert not isinstance(engine.runner.model, CompiledTransformer)
    assert caplog.messages == ["eager PyTorch computes: kernels cannot be compiled: it is Thursday"]
    assert all((layer.stored() is None) == is_packed(CPU, torch.float32) for layer in layers_of(engine))


def test_a_library_that_cannot_be_loaded_is_compiled_again(library, expected, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    build = FakeBuild(broken, library)
    build.end()
    engine = engine_with(build)
    assert "file too short" in build.discarded[0] or "invalid ELF header" in build.discarded[0]
    assert not isinstance(engine.runner.model, CompiledTransformer)
    build.end()
    assert tokens_of(engine) == expected
    assert isinstance(engine.runner.model, CompiledTransformer)


@pytest.mark.parametrize("settings", [{"compile": True}, {"deterministic": True}])
def test_loading_waits_for_the_compiler_if_asked_to_or_if_results_must_not_change(library, settings):
    assert isinstance(engine_with(FakeBuild(library), **settings).runner.model, CompiledTransformer)


def test_if_the_kernels_are_demanded_a_failure_of_the_compiler_is_an_error():
    with pytest.raises(ValueError, match=r"^compile=True: no compiler; install one, or set compile to auto$"):
        engine_with(FakeBuild("no compiler; install one"), compile=True)


@pytest.mark.parametrize(
    ("device", "dtype", "machine", "reason"),
    [
        ("cuda", torch.bfloat16, "x86_64", "there are no compiled kernels for cuda; set device to cpu"),
        ("cpu", torch.float16, "x86_64", "there are no compiled kernels for float16; set dtype to bfloat16 or float32"),
        ("cpu", torch.bfloat16, "aarch64", "there are no compiled kernels for aarch64, only for x86-64"),
    ],
)
def test_where_there_are_no_kernels_only_a_demand_is_an_error(monkeypatch, caplog, device, dtype, machine, reason):
    monkeypatch.setattr(compilation.platform, "machine", lambda: machine)
    monkeypatch.setattr(compilation, "build_kernels", lambda **_: pytest.fail("nothing to compile"))
    place = torch.device(device)
    assert Compilation.start(EngineConfig(), place, dtype) is None
    assert Compilation.start(EngineConfig(compile=False), place, dtype) is None
    assert not caplog.messages
    with pytest.raises(ValueError, match=f"^compile=True: {reason}, or set compile to auto$"):
        Compilation.start(EngineConfig(compile=True), place, dtype)


def test_a_measurement_begins_when_the_kernels_are_compiled_or_cannot_be(monkeypatch, library):
    build = FakeBuild(library)
    monkeypatch.setattr(compilation, "build_kernels", lambda **_: build)
    settled = Compilation.start(EngineConfig(), CPU, torch.float32, wait=True)
    assert settled is not None
    assert settled.layout == "stored"
    failed = FakeBuild("kernels cannot be compiled: it is Thursday")
    monkeypatch.setattr(compilation, "build_kernels", lambda **_: failed)
    assert Compilation.start(EngineConfig(), CPU, torch.float32, wait=True) is None


@pytest.mark.parametrize(
    ("settings", "wait", "delay_s"),
    [
        ({}, False, compilation.DELAY_S),
        ({}, True, 0),
        ({"compile": True}, False, 0),
        ({"deterministic": True}, False, 0),
    ],
)
def test_the_compiler_lets_a_small_model_start_unless_its_first_step_waits(monkeypatch, settings, wait, delay_s):
    seen = []
    monkeypatch.setattr(compilation, "build_kernels", lambda delay_s: seen.append(delay_s) or FakeBuild(None))
    Compilation.start(EngineConfig(**settings), CPU, torch.float32, wait=wait)
    assert seen == [delay_s]


def test_without_a_compiler_the_log_says_so_and_pytorch_computes(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    build = FakeBuild()
    build.error = "there is no C++ compiler"
    monkeypatch.setattr(compilation, "build_kernels", lambda **_: build)
    assert Compilation.start(EngineConfig(), CPU, torch.float32) is None
    assert caplog.messages == ["eager PyTorch computes: there is no C++ compiler"]
    with pytest.raises(ValueError, match=r"^compile=True: there is no C\+\+ compiler, or set compile to auto$"):
        Compilation.start(EngineConfig(compile=True), CPU, torch.float32)


def test_without_kernels_on_another_rank_pytorch_computes(library, expected, caplog):
    build = FakeBuild(library)
    config = EngineConfig(max_seq_len=64, max_batch_size=4)
    waiting = Compilation(build, config)  # type: ignore[arg-type]
    runner = runner_for(config, waiting.layout)
    assert waiting.is_compiled()
    waiting.begin(runner, may_use=False)
    assert tokens_of(Engine(runner, SingleComm(), config)) == expected
    assert not isinstance(runner.model, CompiledTransformer)
    assert caplog.messages == ["eager PyTorch computes: not every rank has compiled kernels"]


def test_if_its_threads_cannot_be_started_pytorch_computes(library, expected, caplog, monkeypatch):
    def fail(path, num_threads):
        raise RuntimeError(f"{num_threads - 1} threads cannot be started")

    monkeypatch.setattr(compilation, "Kernels", fail)
    build = FakeBuild(library)
    build.end()
    engine = engine_with(build)
    assert caplog.messages == [f"eager PyTorch computes: {torch.get_num_threads() - 1} threads cannot be started"]
    assert tokens_of(engine) == expected
    assert not build.discarded
