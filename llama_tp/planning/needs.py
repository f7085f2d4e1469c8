"""What the ranks of a group hold and read: of every rank, and of the busiest one, for which the others wait."""

from __future__ import annotations

from dataclasses import dataclass

from llama_tp.config import EngineConfig
from llama_tp.engine.memory import ITEMSIZE, MemoryModel
from llama_tp.model.weights import DENSE_FORMATS, WeightFormats
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import Ranks, check_tp_size, num_parameters_of_rank, num_ranks, vocab_shard


@dataclass(frozen=True, slots=True)
class RankNeeds:
    """One rank's weights and KV cache."""

    weights: int
    """Bytes in memory."""
    weights_read: int
    """Bytes that each step reads: all but the embedding, of which a step reads a few rows."""
    kv_token: int
    """Bytes of KV cache per token."""
    parameters: int
    multiplied: int
    """Parameters with which each token is multiplied."""


@dataclass(frozen=True, slots=True)
class GroupNeeds:
    """All ranks. Each property is that of the rank that needs most."""

    ranks: tuple[RankNeeds, ...]

    @classmethod
    def of(
        cls, args: ModelArgs, ranks: Ranks, dtype: str, device_type: str, formats: WeightFormats = DENSE_FORMATS
    ) -> GroupNeeds:
        """For ranks on devices of a type (cpu or cuda). ValueError if the model cannot run on them."""
        check_tp_size(args, ranks)
        config = EngineConfig(dtype=dtype)
        rows = vocab_shard(args, ranks) * args.dim
        needs = []
        for rank in range(num_ranks(ranks)):
            memory = MemoryModel.of(args, config, ranks, rank, dtype, device_type, formats)
            # With tied embeddings a GPU multiplies with the embedding itself, a CPU with a packed copy of it.
            unread = 0 if args.tied_embeddings and device_type != "cpu" else rows * ITEMSIZE[dtype]
            parameters = num_parameters_of_rank(args, ranks, rank)
            multiplied = parameters - (0 if args.tied_embeddings else rows)
            needs.append(RankNeeds(memory.weights, memory.weights - unread, memory.token, parameters, multiplied))
        return cls(tuple(needs))

    @property
    def weights(self) -> int:
        return max(rank.weights for rank in self.ranks)

    @property
    def kv_token(self) -> int:
        return max(rank.kv_token for rank in self.ranks)

    @property
    def parameters(self) -> int:
        return max(rank.parameters for rank in self.ranks)

    @property
    def multiplied(self) -> int:
        return max(rank.multiplied for rank in self.ranks)

    def cache_tokens(self, memory: int, share: float) -> int:
        """Tokens whose keys and values fit on every rank, in a `share` of what the weights leave of `memory` bytes."""
        return min(int(share * max(0, memory - rank.weights)) // rank.kv_token for rank in self.ranks)

    def bytes_held(self, tokens: int) -> int:
        """Weights and the KV cache of `tokens` tokens."""
        return max(rank.weights + tokens * rank.kv_token for rank in self.ranks)

    def bytes_read(self, tokens: int) -> int:
        """Bytes that a step reads, with `tokens` tokens in the KV cache of its sequences."""
        return max(rank.weights_read + tokens * rank.kv_token for rank in self.ranks)
