"""How one engine runs a model, and every check that needs more than one setting.

The architecture is in `model_args.py`, model-config.yaml in `torchserve/config.py`. Nothing here touches a device or a
tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llama_tp.config_error import ConfigError

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
VERIFY_CHECKPOINT = ("always", "once", "size")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine runs a model: its limits, precision and device. The same on every rank."""

    max_seq_len: int = 2048
    """Maximum prompt plus generated tokens of one sequence."""
    max_batch_size: int = 8
    """Maximum sequences that hold KV cache at the same time."""
    max_batched_tokens: int = 512
    """Maximum tokens computed per step; longer prompts are prefilled in chunks of this size."""
    page_size: int = 16
    """Tokens per page of KV cache."""
    cache_pages: int = 0
    """Pages of the whole KV cache. 0: enough for max_batch_size sequences of max_seq_len."""
    kv_cache_memory: int | float | str | None = None
    """KV cache per rank, from which loading derives cache_pages: bytes ("6GiB"), or, below 1, a share of the memory
    left after weights and steps."""
    max_waiting: int = 1024
    """Maximum outputs that wait to join the batch; a request that would exceed it is refused."""
    prefix_cache: bool = True
    """Whether prompts with a common prefix share pages."""
    speculative_tokens: int = 0
    """Maximum tokens per step that are predicted of a sequence, from what followed its last tokens earlier in prompt or
    output. Those that are right save steps; the output is the same. 0: none."""
    speculative_max_batch: int = 2
    """No tokens are predicted in steps with more running sequences than this."""
    deterministic: bool = False
    """Whether a request's logits are bit-identical however it is batched and chunked, in every dtype."""
    dtype: str = "auto"
    """bfloat16 | float16 | float32 | auto: the checkpoint's, or float32 where that is faster: on devices without
    instructions for the checkpoint's, except with AVX2 for one or two sequences."""
    compile: str | bool = "auto"
    """Whether kernels compiled on this machine compute. auto: on a CPU, as soon as they are compiled, if
    there is a compiler; True: loading waits for them, and fails without; False: never."""
    device: str = "auto"
    """cpu | cuda | auto: cuda if available."""
    threads: int | None = None
    """CPU threads of this rank. None: its share of the available cores."""
    tp_shares: tuple[int, ...] | None = None
    """Query heads of each rank, for unequal devices. None: equal shares."""
    verify_checkpoint: str = "once"
    """Which large files are hashed while loading. always: all; once: those not hashed before or changed since; size:
    none, only sizes are compared."""
    collective_timeout_s: float = 20.0
    """A peer that is silent for longer ends the group."""
    heartbeat_s: float = 2.0
    """Interval at which an idle leader signals to its followers that it is alive."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)!r} must be a positive integer"
            for name in (
                *("max_seq_len", "max_batch_size", "max_batched_tokens", "page_size", "max_waiting"),
                "speculative_max_batch",
            )
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1
        ]
        if not _is_int(self.speculative_tokens) or self.speculative_tokens < 0:
            problems.append(
                f"speculative_tokens={self.speculative_tokens!r} must be a non-negative integer; 0 turns it off"
            )
        if self.threads is not None and (not _is_int(self.threads) or self.threads < 1):
            problems.append(f"threads={self.threads!r} must be a positive integer")
        if self.tp_shares is not None and not (isinstance(self.tp_shares, tuple) and all(map(_is_int, self.tp_shares))):
            problems.append(f"tp_shares={self.tp_shares!r} must be a tuple of integers, the query heads of each rank")
        if self.dtype not in DTYPES:
            problems.append(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if not (self.compile == "auto" or isinstance(self.compile, bool)):
            problems.append(f"compile={self.compile!r} must be one of auto, true, false")
        if self.device not in DEVICES:
            problems.append(f"device={self.device!r} must be one of {', '.join(DEVICES)}")
        if self.verify_checkpoint not in VERIFY_CHECKPOINT:
            problems.append(
                f"verify_checkpoint={self.verify_checkpoint!r} must be one of {', '.join(VERIFY_CHECKPOINT)}"
            )
        if not problems and self.max_batched_tokens < self.max_batch_size:
            problems.append(
                f"max_batched_tokens={self.max_batched_tokens} must be at least max_batch_size={self.max_batch_size}: "
                "every running sequence computes one token per step"
            )
        if not 0 < self.heartbeat_s < self.collective_timeout_s:
            problems.append(
                f"heartbeat_s={self.heartbeat_s!r} must be greater than 0 and less than "
                f"collective_timeout_s={self.collective_timeout_s!r}"
            )
        if self.kv_cache_memory is not None:
            try:
                parse_memory(self.kv_cache_memory)
            except ValueError as error:
                problems.append(f"kv_cache_memory={self.kv_cache_memory!r} {error}")
        if problems:
            raise ConfigError(problems)

    @property
    def pages_per_sequence(self) -> int:
        """Pages that a sequence of max_seq_len tokens needs."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the whole KV cache."""
        return self.cache_pages or self.max_batch_size * self.pages_per_sequence

    @property
    def cache_tokens(self) -> int:
        """Tokens that fit into the whole KV cache."""
        return self.num_pages * self.page_size


_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_memory(value: float | str) -> int | float:
    """Bytes as an int, or a share of free memory as a float in (0, 1). ValueError says what it must be."""
    constraint = 'must be bytes (6442450944, "6GiB"), or a share of free memory, greater than 0 and less than 1 (0.9)'
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(constraint)
    if isinstance(value, str):
        number, unit = re.fullmatch(r"\s*([0-9.]*)\s*(.*?)\s*", value, re.DOTALL).groups()  # type: ignore[union-attr]
        try:
            value = float(number) * _UNITS[unit.upper()]
        except (ValueError, KeyError):
            raise ValueError(constraint) from None
    if 0 < value < 1:
        return float(value)
    if not 1 <= value < float("inf"):
        raise ValueError(constraint)
    return int(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
