"""What a step of the engine must read and compute: the numerators of the shares of a ceiling."""

from __future__ import annotations

from dataclasses import dataclass

from llama_tp.engine.engine import Engine
from llama_tp.model.linear import Linear


@dataclass(frozen=True, slots=True)
class Work:
    """Of one rank."""

    weight_bytes: int
    """Of all linear layers, as they are held: every step reads them. A few rows of the embedding are not counted."""
    kv_bytes: int
    """Keys and values of one token."""
    layer_flops: int
    """Per token, of the linear layers that every token of a prompt needs."""
    output_flops: int
    """Per token that is sampled."""
    attention_flops: int
    """Per token and key that it attends to."""

    @classmethod
    def of(cls, engine: Engine) -> Work:
        """Of an engine's model."""
        runner = engine.runner
        args = runner.model.args
        linears = [(name, one) for name, one in runner.model.named_modules() if isinstance(one, Linear)]
        flops = {True: 0, False: 0}
        for name, one in linears:
            flops[".layers." in f".{name}"] += 2 * one.in_features * one.out_features
        # Queries times keys, and probabilities times values.
        attention = 4 * args.n_layers * args.n_heads * args.head_dim // engine.comm.size
        return cls(
            weight_bytes=sum(one.num_bytes for _, one in linears),
            kv_bytes=args.n_layers * runner.cache.bytes_per_slot,
            layer_flops=flops[True],
            output_flops=flops[False],
            attention_flops=attention,
        )

    def decode_bytes(self, batch: int, context: float, shared: int = 0) -> float:
        """Read by a step of decode of `batch` sequences of `context` tokens, of which they share the first ones."""
        return self.weight_bytes + self.kv_bytes * (shared + batch * max(0.0, context - shared))

    def prefill_flops(self, batch: int, tokens: int, shared: int = 0) -> float:
        """Of computing `batch` prompts of `tokens`, whose first ones are computed once. Only a prompt's last token is
        sampled from."""
        every, common = _pairs(tokens), _pairs(shared)
        computed = shared + batch * (tokens - shared)
        pairs = common + batch * (every - common)
        return computed * self.layer_flops + batch * self.output_flops + pairs * self.attention_flops


def _pairs(tokens: int) -> int:
    """Pairs of a token and one that it attends to."""
    return tokens * (tokens + 1) // 2
