"""The model with its steps of few tokens computed by the compiled library, all others as before.

Legend: T tokens, D model dim, d head dim, S sampled tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from llama_tp.model.attention.base import AttentionBackend, SequenceTokens, StepAttention
from llama_tp.model.batch import Batch, Output
from llama_tp.model.cpu.library import (
    PHASES_OF_OUTPUT,
    PHASES_PER_LAYER,
    Form,
    LayerStruct,
    Library,
    LinearStruct,
    ModelStruct,
    StepStruct,
)
from llama_tp.model.kv_cache import KVCache, LayerCache
from llama_tp.model.linear import Linear
from llama_tp.model.quantization import QuantizedWeight
from llama_tp.model.transformer import Transformer, TransformerBlock

MAX_TOKENS = 16
"""Tokens of a step that the library computes."""

_FORMS = {"int8": Form.INT8, "int8_groups": Form.INT8_GROUPS, "int4": Form.INT4}


class CompiledStep:
    """The layout of a step for the library: see `llama_tp.model.attention.base.StepAttention`."""

    __slots__ = ("num_sequences", "num_units", "ranges", "sequences", "units")

    def __init__(self, sequences: Sequence[SequenceTokens], num_kv_heads: int, keys_per_part: int) -> None:
        table, ranges, units = array("i"), array("i"), array("i")
        first = 0
        for index, one in enumerate(sequences):
            length = one.start + one.num_tokens
            table.extend((first, one.num_tokens, one.start, len(ranges) // 2))
            for part in one.pages.ranges(length, length):
                ranges.extend((part.first, part.length))
            for part in range((length - 1) // keys_per_part + 1):
                for head in range(num_kv_heads):
                    units.extend((index, head, part))
            first += one.num_tokens
        self.sequences, self.ranges, self.units = table, ranges, units
        self.num_sequences = len(sequences)
        self.num_units = len(units) // 3

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
        raise AssertionError("the library computes this step's attention")


class CompiledBackend:
    """Lays out steps of few tokens for the library, and others for another backend."""

    def __init__(self, other: AttentionBackend, num_kv_heads: int, keys_per_part: int) -> None:
        self._other = other
        self._num_kv_heads = num_kv_heads
        self._keys_per_part = keys_per_part

    def prepare(self, sequences: Sequence[SequenceTokens], *, num_padding: int = 0) -> StepAttention:
        if sum(one.num_tokens for one in sequences) > MAX_TOKENS:
            return self._other.prepare(sequences, num_padding=num_padding)
        return CompiledStep(sequences, self._num_kv_heads, self._keys_per_part)


class CompiledTransformer(nn.Module):
    """A localized model, with steps that a CompiledBackend has laid out computed by the library.

    Holds pointers into the model's weights and the cache, which must not be replaced.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, library: Library, *, max_seq_len: int, in_bfloat16: bool
    ) -> None:
        super().__init__()
        self.args = model.args
        self._model = model
        self._library = library
        self._comm = model.layers[0].attention.wo.comm
        self._vocab_size = model.output.vocab_size
        self._kept: list[object] = []  # what the structs point to
        blocks = [cast(TransformerBlock, block) for block in model.layers]
        layers = (LayerStruct * len(blocks))(*map(self._layer, blocks))
        self._output = self._linear(model.output.linear)
        data = cache._data
        attention, ffn = blocks[0].attention, blocks[0].feed_forward
        struct = ModelStruct(
            dim=model.args.dim,
            hidden=ffn.w13.out_features // 2,
            heads=attention.split[0] - attention.split[1],
            kv_heads=cache.num_kv_heads,
            head_dim=model.args.head_dim,
            layers=len(blocks),
            threads=torch.get_num_threads(),
            max_tokens=MAX_TOKENS,
            max_parts=-(-max_seq_len // library.keys_per_part),
            is_bfloat16_cache=data.dtype == torch.bfloat16,
            in_bfloat16=in_bfloat16,
            eps=model.args.norm_eps,
            layer=layers,
            norm=self._address(model.norm._weight),
            output=self._output,
            cache=data.data_ptr(),
            num_slots=data.size(3),
        )
        self._kept.append(layers)
        self._context = library.create(struct)
        self._num_phases = PHASES_PER_LAYER * len(blocks)
        weakref.finalize(self, library.destroy, self._context)

    def forward(self, batch: Batch, cache: KVCache) -> Output:
        layout = batch.attention
        if not isinstance(layout, CompiledStep):
            return self._model(batch, cache)
        x = self._model.tok_embeddings(batch.tokens).float()
        is_finite = torch.empty(x.size(0), dtype=torch.bool)
        num_sampled = batch.sampled.numel()
        logits = torch.empty(num_sampled, self._output.rows)
        step = StepStruct(
            num_tokens=x.size(0),
            num_sequences=layout.num_sequences,
            num_sampled=num_sampled,
            num_units=layout.num_units,
            x=x.data_ptr(),
            rope=batch.rope.data_ptr(),
            sequences=layout.sequences.buffer_info()[0],
            ranges=layout.ranges.buffer_info()[0],
            units=layout.units.buffer_info()[0],
            sampled=batch.sampled.data_ptr(),
            logits=logits.data_ptr(),
            is_finite=is_finite.data_ptr(),
        )
        if self._comm.size == 1:
            self._library.run(self._context, step, 0, self._num_phases + PHASES_OF_OUTPUT)
        else:
            self._run_sharded(x, step)
        if not num_sampled:
            return Output(None, is_finite)
        gathered = self._comm.gather(logits)
        return Output(logits if gathered is None else gathered[..., : self._vocab_size], is_finite)

    def _run_sharded(self, x: Tensor, step: StepStruct) -> None:
        """The same in pieces, each followed by a sum over the ranks."""
        sums = torch.empty_like(x)
        step.partial_sums = sums.data_ptr()
        for index, block in enumerate(self._model.layers):
            first = index * PHASES_PER_LAYER
            self._library.run(self._context, step, first, first + 3)
            x += self._comm.all_reduce(sums)
            if (bias := block.attention.wo.bias) is not None:
                x += bias
            self._library.run(self._context, step, first + 3, first + PHASES_PER_LAYER)
            x += self._comm.all_reduce(sums)
            if (bias := block.feed_forward.w2.bias) is not None:
                x += bias
        self._library.run(self._context, step, self._num_phases, self._num_phases + PHASES_OF_OUTPUT)

    def _layer(self, block: TransformerBlock) -> LayerStruct:
        attention, ffn = block.attention, block.feed_forward
        return LayerStruct(
            wqkv=self._linear(attention.wqkv),
            wo=self._linear(attention.wo.linear, attention.wo.bias),
            w13=self._linear(ffn.w13),
            w2=self._linear(ffn.w2.linear, ffn.w2.bias),
            attention_norm=self._address(block.attention_norm._weight),
            ffn_norm=self._address(block.ffn_norm._weight),
            qk_norm=None if attention.qk_norm is None else self._address(attention.qk_norm._weight),
        )

    def _linear(self, linear: Linear, bias: Tensor | None = None) -> LinearStruct:
        weight = linear.stored()
        bias = linear.bias if bias is None else bias
        struct = LinearStruct(rows=linear.out_features, columns=linear.in_features)
        if bias is not None and self._comm.size == 1:
            struct.bias = self._address(bias.float())
        if isinstance(weight, QuantizedWeight):
            struct.form = _FORMS[weight.form]
            struct.weight, struct.scales = self._address(weight.weight), self._address(weight.scales)
            if weight.offsets is not None:
                struct.offsets = self._address(weight.offsets)
                struct.has_float32_offsets = weight.offsets.dtype == torch.float32
        else:
            struct.form = Form.BFLOAT16 if weight.dtype == torch.bfloat16 else Form.FLOAT32
            struct.weight = self._address(weight)
        return struct

    def _address(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
