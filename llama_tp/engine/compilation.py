"""Compiled kernels for an engine: whether it wants them, and when they take over.

Eager PyTorch computes until they are compiled, and for good if they cannot be. Ranks need not switch at the same step:
what they exchange has the same form either way.
"""

from __future__ import annotations

import logging
import platform
from typing import cast

import torch

from llama_tp.config import EngineConfig
from llama_tp.engine.runner import ModelRunner
from llama_tp.model.cpu.attention import KernelBackend
from llama_tp.model.cpu.build import Build, build_kernels
from llama_tp.model.cpu.kernels import Kernels
from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import Layout
from llama_tp.parallel.agreement import TransientError
from llama_tp.parallel.compiled import CompiledTransformer, use_pytorch

log = logging.getLogger(__name__)

DELAY_S = 1.0
"""Before the compiler starts if nothing waits for it: small models are loaded by then and have made a first token,
which would take more than twice as long beside it."""


class Compilation:
    """One rank's build of the kernels."""

    def __init__(self, build: Build, config: EngineConfig, *, wait: bool = False) -> None:
        self._build = build
        self._config = config
        self._may_wait = wait or _must_wait(config)

    @staticmethod
    def start(
        config: EngineConfig, device: torch.device, dtype: torch.dtype, *, wait: bool = False
    ) -> Compilation | None:
        """Start to compile, if the configuration wants kernels and there are any for the device and dtype. ValueError
        if compile is True and there are none.

        wait: return when they are compiled, or cannot be.
        """
        if config.compile is False:
            return None
        if reason := why_no_kernels(device, dtype):
            if config.compile is True:
                raise ValueError(f"compile=True: {reason}, or set compile to auto")
            return None
        build = build_kernels(delay_s=0.0 if wait or _must_wait(config) else DELAY_S)
        if wait:
            build.wait()
        if build.error is None:
            return Compilation(build, config, wait=wait)
        if config.compile is True:
            raise _without_kernels(build.error)
        log.info("eager PyTorch computes: %s", build.error)
        return None

    @property
    def layout(self) -> Layout:
        """For the layers of the model to load."""
        return "both" if self._build.library() is None else "stored"

    def is_compiled(self) -> bool:
        """Whether there are kernels, once that is known."""
        return self._build.wait() is not None

    def begin(self, runner: ModelRunner, *, may_use: bool = True) -> None:
        """Let the runner use the kernels, now or as soon as they are compiled. ValueError if compile is True and they
        cannot be.

        may_use: whether to use them at all.
        """
        if not may_use:
            self._give_up(runner, "not every rank has compiled kernels")
        elif not self._settle(runner):
            runner.before_step = lambda: self._settle(runner)

    def _settle(self, runner: ModelRunner) -> bool:
        """Whether it is settled which kernels compute."""
        path = self._build.wait() if self._may_wait else self._build.library()
        if path is None:
            if self._build.error is None:
                return False
            self._give_up(runner, self._build.error)
            return True
        try:
            kernels = Kernels(path, torch.get_num_threads())
            use_kernels(runner, cast(Transformer, runner.model), kernels, self._config)
        except (OSError, AttributeError) as error:
            self._build.discard(str(error))
            return self._settle(runner)
        except (RuntimeError, MemoryError) as error:
            self._give_up(runner, str(error))
        else:
            log.info("compiled kernels compute (%s)", path)
        return True

    def _give_up(self, runner: ModelRunner, reason: str) -> None:
        if self._config.compile is True:
            raise _without_kernels(reason)
        log.warning("eager PyTorch computes: %s", reason)
        use_pytorch(cast(Transformer, runner.model))


def _must_wait(config: EngineConfig) -> bool:
    """Whether the first step needs the kernels. In deterministic mode results would differ before and after."""
    return config.compile is True or config.deterministic


def _without_kernels(error: str) -> TransientError:
    """Not permanent: a compiler may be installed, or a disk get free, while the configuration stays the same."""
    return TransientError(f"compile=True: {error}, or set compile to auto")


def use_kernels(runner: ModelRunner, model: Transformer, kernels: Kernels, config: EngineConfig) -> None:
    """Let a runner compute its model's steps of few tokens with the kernels. Its layers must hold stored weights."""
    cache = runner.cache
    compiled = CompiledTransformer(
        model, cache, kernels, max_seq_len=config.max_seq_len, deterministic=config.deterministic
    )
    runner.use_kernels(compiled, KernelBackend(cache, kernels.library))


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """With the remedy, if there is one. None: there are some."""
    if device.type != "cpu":
        return f"there are no compiled kernels for {device.type}; set device to cpu"
    if dtype not in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        return f"there are no compiled kernels for {name}; set dtype to bfloat16 or float32"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"there are no compiled kernels for {platform.machine()}, only for x86-64"
    return None
