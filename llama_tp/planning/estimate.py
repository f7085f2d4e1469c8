"""The memory and the speed of a model on N devices: what a step must hold, read, compute and communicate at least.

A step of decode reads all weights and the keys and values of its sequences, and multiplies one token of each sequence
with all weights. It takes at least as long as the slower of the two on the busiest rank, plus its all-reduces:

    max((W + B*c*K) / bandwidth, 2*P*B / flops) + all-reduces

with W bytes of weights, K bytes of KV cache per token, P parameters, B sequences and c tokens of context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from llama_tp.config import EngineConfig
from llama_tp.engine.memory import DEFAULT_SHARE, FRAGMENTATION, HEADROOM, ITEMSIZE, kernel_buffers
from llama_tp.engine.scheduler import MAX_SCORED
from llama_tp.model.weights import WeightFormats
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import Ranks, num_ranks, shard
from llama_tp.planning.devices import GIB, Device
from llama_tp.planning.needs import GroupNeeds

_CONTEXT_OF_DEVICE = GIB
"""Bytes of a GPU that CUDA and NCCL take outside PyTorch's allocator. An assumption, on the safe side."""
_BYTES_PER_LOGIT = 48
"""Of the sampler, with every sampling feature on. From the 1.2 GiB that the largest steps of Llama 3.1 8B took with 128
sequences on a GPU (docs/performance.md)."""
_BYTES_PER_SCORED_LOGIT = 12
"""Of a prompt that is scored: this rank's and all ranks' logits, and their copy in float32. They are scored in blocks.
Counted, not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The least time of a step of decode."""

    batch: int
    """Sequences, which get one token each."""
    bytes_read: int
    """By the busiest rank."""
    reading_s: float
    computing_s: float
    reducing_s: float
    """All-reduces."""
    even_s: float
    """The step, if all ranks had equal shares."""

    @property
    def seconds(self) -> float:
        return max(self.reading_s, self.computing_s) + self.reducing_s

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.batch / self.seconds

    @property
    def bound(self) -> str:
        """What takes most of the time."""
        times = {"reading": self.reading_s, "computing": self.computing_s, "all-reduces": self.reducing_s}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Estimate:
    """A model on a group of equal devices."""

    args: ModelArgs
    device: Device
    ranks: Ranks
    """How many, or the query heads of each."""
    dtype: str
    config: EngineConfig
    """The limits: sequences at the same time, their length, tokens per step."""
    context: int
    """Tokens that a sequence has in the cache on average, for speeds."""
    formats: WeightFormats = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return num_ranks(self.ranks)

    @cached_property
    def needs(self) -> GroupNeeds:
        """Of the ranks."""
        return GroupNeeds.of(self.args, self.ranks, self.dtype, self.device.type, self.formats)

    @cached_property
    def whole(self) -> GroupNeeds:
        """Of one rank alone."""
        return GroupNeeds.of(self.args, 1, self.dtype, self.device.type, self.formats)

    @property
    def unevenness(self) -> float:
        """Weights of the busiest rank, relative to an even share."""
        return self.needs.weights * self.size / self.whole.weights

    # Memory, in bytes per rank.

    @property
    def memory(self) -> int:
        """Of the rank's device, or its share of the host."""
        return self.device.memory // self.size if self.device.ranks_share_it else self.device.memory

    @property
    def kv_cache(self) -> int:
        """For all sequences at their full length."""
        return self.config.cache_tokens * self.needs.kv_token

    @cached_property
    def step_memory(self) -> int:
        """An estimate of the largest step's activations, with the margin that the engine adds when it measures them.
        On a CPU, as the engine counts it, the buffers of the compiled kernels."""
        if self.device.type == "cpu":
            threads = max(1, self.device.per_host // self.size)
            of_ranks = range(self.size)
            return max(
                kernel_buffers(self.args, self.config, self.ranks, rank, self.dtype, threads) for rank in of_ranks
            )
        tokens, sequences, itemsize = self.config.max_batched_tokens, self.config.max_batch_size, self._itemsize
        names = ("layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight")
        queries, hidden = (self._longest_shard(name) for name in names)
        # Residual, its norm and the block's output; gate, up and their product, or queries, keys, values and the mask.
        feed_forward = tokens * (3 * self.args.dim + 3 * hidden)
        attention = tokens * (3 * self.args.dim + 4 * queries + self.config.max_seq_len)
        sampling = min(sequences, tokens) * self.args.vocab_size * _BYTES_PER_LOGIT
        num_scored = min(tokens, MAX_SCORED + sequences)
        scoring = num_scored * self.args.vocab_size * _BYTES_PER_SCORED_LOGIT
        return int(FRAGMENTATION * max(itemsize * feed_forward, itemsize * attention, sampling, scoring)) + HEADROOM

    @property
    def reserve(self) -> int:
        """What is kept free: memory outside PyTorch, and the part of the rest that the engine leaves by default."""
        fixed = 0 if self.device.type == "cpu" else _CONTEXT_OF_DEVICE
        left = max(0, self.memory - fixed - self.step_memory - self.needs.weights)
        return fixed + left - int(DEFAULT_SHARE[self.device.type] * left)

    @property
    def cache_tokens(self) -> int:
        """Tokens of KV cache that fit."""
        fixed = 0 if self.device.type == "cpu" else _CONTEXT_OF_DEVICE
        available = self.memory - fixed - self.step_memory
        return self.needs.cache_tokens(available, DEFAULT_SHARE[self.device.type])

    @property
    def max_batch(self) -> int:
        """Sequences of max_seq_len that fit at the same time."""
        return self.cache_tokens // (self.config.pages_per_sequence * self.config.page_size)

    @property
    def fits(self) -> bool:
        """Whether max_batch_size sequences fit at their full length."""
        return self.max_batch >= self.config.max_batch_size

    @property
    def total(self) -> int:
        """Weights, KV cache, step and reserve."""
        return self.needs.bytes_held(self.config.cache_tokens) + self.step_memory + self.reserve

    # Communication.

    @property
    def all_reduces(self) -> int:
        """Per step: of the embedding, and two in each layer. The gathering of logits is not counted."""
        return 0 if self.size == 1 else 2 * self.args.n_layers + 1

    @property
    def all_reduce_bytes(self) -> int:
        """Of one all-reduce, per token."""
        return self.args.dim * self._itemsize

    # Time.

    def step(self, batch: int) -> Step:
        """A step of decode of `batch` sequences of this context."""
        share = self.size if self.device.ranks_share_it else 1
        bandwidth, flops = self.device.bandwidth / share, self.device.flops / share
        tokens = batch * self.context
        bytes_read = self.needs.bytes_read(tokens)
        sent = 2 * (self.size - 1) / self.size * batch * self.all_reduce_bytes  # by each rank, in a ring
        reducing = self.all_reduces * (self.device.latency + sent / self.device.link)
        even = max(
            self.whole.bytes_read(tokens) / self.size / bandwidth, 2 * self.whole.multiplied * batch / self.size / flops
        )
        return Step(
            batch=batch,
            bytes_read=bytes_read,
            reading_s=bytes_read / bandwidth,
            computing_s=2 * self.needs.multiplied * batch / flops,
            reducing_s=reducing,
            even_s=even + reducing,
        )

    def _longest_shard(self, name: str) -> int:
        return max(shard(self.args, name, self.ranks, rank).length for rank in range(self.size))

    @property
    def _itemsize(self) -> int:
        return ITEMSIZE[self.dtype]
