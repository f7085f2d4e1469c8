"""A localized model that computes with compiled kernels: steps of few tokens as a whole, of others what is not a matrix
product.

Legend: T tokens, D model dim, S sampled tokens, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from llama_tp.model.batch import Batch, Output
from llama_tp.model.cpu.attention import KernelStep, max_tokens
from llama_tp.model.cpu.kernels import Kernels, linear_struct
from llama_tp.model.cpu.library import (
    PHASES_OF_ATTENTION,
    PHASES_OF_OUTPUT,
    PHASES_PER_LAYER,
    LayerStruct,
    LinearStruct,
    ModelStruct,
    StepStruct,
)
from llama_tp.model.cpu.linear import KernelLinear, WidenedLinear
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.linear import Linear
from llama_tp.model.norm import Norm
from llama_tp.model.quantization import QuantizedWeight
from llama_tp.model.quantized_linear import for_pytorch
from llama_tp.model.transformer import Transformer, TransformerBlock
from llama_tp.parallel.local_modules import FusedAttention, FusedFeedForward, RowLinear, VocabLinear


def use_pytorch(model: Transformer) -> None:
    """Lay out the linear layers of a model for PyTorch's kernels, in place: there are no others."""
    _replace_linears(model, for_pytorch)


def _replace_linears(module: nn.Module, new: Callable[[Linear], Linear]) -> None:
    for name, child in module.named_children():
        if isinstance(child, Linear):
            setattr(module, name, new(child))
        else:
            _replace_linears(child, new)


class CompiledTransformer(nn.Module):
    """Computes the steps that a KernelBackend has laid out with the kernels.

    Takes over the model, whose layers must hold their weights as stored, and the cache: the kernels read and write
    their memory. RuntimeError if the kernels cannot compute the model, MemoryError if there is no memory for their
    buffers; both leave the model as it is. Later steps allocate no buffers.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, kernels: Kernels, *, max_seq_len: int, deterministic: bool
    ) -> None:
        super().__init__()
        may_round = cache.dtype == torch.bfloat16 and not deterministic
        self.args = model.args
        self._model = model
        self._kernels = kernels
        self._kept: list[object] = []  # what the structs point to
        blocks = [cast(TransformerBlock, block) for block in model.layers]
        attention, feed_forward = _fused(blocks[0])
        output = cast(VocabLinear, model.output)
        self._comm = output.comm
        self._vocab_size = output.vocab_size
        self._dtype = cache.dtype
        layers = (LayerStruct * len(blocks))(*map(self._layer, blocks))
        num_qk_heads, num_kv_heads = attention.split
        self._num_heads = num_qk_heads - num_kv_heads
        memory = cache.memory()
        struct = ModelStruct(
            dim=model.args.dim,
            hidden=feed_forward.w13.out_features // 2,
            heads=self._num_heads,
            kv_heads=num_kv_heads,
            head_dim=model.args.head_dim,
            layers=len(blocks),
            max_tokens=max_tokens(cache.dtype),
            max_parts=-(-max_seq_len // kernels.library.keys_per_part),
            is_bfloat16_cache=cache.dtype == torch.bfloat16,
            may_round=may_round,
            eps=model.args.norm_eps,
            team=kernels.team,
            layer=layers,
            norm=self._weight(model.norm),
            output=self._linear(output.linear, output.linear.bias),
            cache=self._address(memory),
            num_slots=memory.size(3),
        )
        self._num_logits = output.linear.out_features
        self._num_phases = PHASES_PER_LAYER * len(blocks)
        self._kept += [layers, kernels]
        if not kernels.library.can_compute(struct):
            raise RuntimeError(
                f"{len(blocks)} layers with a context of {max_seq_len} tokens are too large for the compiled kernels"
            )
        self._context = kernels.library.create_model(struct)
        if self._context is None:
            raise MemoryError("there is not enough memory for the buffers of the compiled kernels")
        weakref.finalize(self, _destroy, kernels, self._context).atexit = False
        _replace_linears(model, lambda layer: _for_many_tokens(layer, kernels, may_round))

    def forward(self, batch: Batch, cache: KVCache) -> Output:
        """As Transformer.forward."""
        layout = batch.attention
        assert isinstance(layout, KernelStep)
        x = self._model.tok_embeddings(batch.tokens).float()  # (T, D), the residual stream
        step = StepStruct(num_tokens=x.size(0), x=x.data_ptr(), rope=batch.rope.data_ptr())
        layout.fill(step)
        if not layout.is_whole:
            return self._by_layers(x, batch, step)
        is_finite = torch.empty(x.size(0), dtype=torch.bool)
        num_sampled = batch.sampled.numel()
        logits = torch.empty(num_sampled, self._num_logits)
        step.num_sampled, step.sampled = num_sampled, batch.sampled.data_ptr()
        step.logits, step.is_finite = logits.data_ptr(), is_finite.data_ptr()
        if self._comm.size == 1:
            self._kernels.library.run(self._context, step, 0, self._num_phases + PHASES_OF_OUTPUT)
        else:
            self._run_sharded(x, step)
        if not num_sampled:
            return Output(None, is_finite)
        return Output(self._gather(logits), is_finite)

    def _by_layers(self, x: Tensor, batch: Batch, step: StepStruct) -> Output:
        """A step of many tokens: PyTorch's matrix products, and the kernels between them."""
        kernels = self._kernels
        y: Tensor | None = None  # to be added to x
        for index, block in enumerate(self._model.layers):
            attention, feed_forward = _fused(cast(TransformerBlock, block))
            norm, ffn_norm = cast(Norm, block.attention_norm), cast(Norm, block.ffn_norm)
            qkv = attention.wqkv(kernels.add_and_normalize(x, y, norm, zero_nonfinite=True))
            out = qkv.new_empty(x.size(0), self._num_heads * attention.head_dim)
            kernels.library.attend(self._context, index, step, qkv.data_ptr(), out.data_ptr())
            h = kernels.add_and_normalize(x, attention.wo(out), ffn_norm)
            y = feed_forward.w2(kernels.gate(feed_forward.w13(h)))
        if y is not None:
            x += y
        is_finite = x.isfinite().all(dim=-1)
        if batch.sampled.numel() == 0:
            return Output(None, is_finite)
        return Output(self._model.output(self._model.norm(x[batch.sampled])).float(), is_finite)

    def _run_sharded(self, x: Tensor, step: StepStruct) -> None:
        """The same in pieces, each followed by a sum over the ranks."""
        run, context = self._kernels.library.run, self._context
        sums = torch.empty_like(x)
        step.partial_sums = sums.data_ptr()
        for index, block in enumerate(self._model.layers):
            attention, feed_forward = _fused(cast(TransformerBlock, block))
            first = index * PHASES_PER_LAYER
            run(context, step, first, first + PHASES_OF_ATTENTION)
            self._add(x, sums, attention.wo.bias)
            run(context, step, first + PHASES_OF_ATTENTION, first + PHASES_PER_LAYER)
            self._add(x, sums, feed_forward.w2.bias)
        run(context, step, self._num_phases, self._num_phases + PHASES_OF_OUTPUT)

    def _add(self, x: Tensor, sums: Tensor, bias: Tensor | None) -> None:
        """In the dtype of the eager model's messages: another rank may still run that."""
        x += self._comm.all_reduce(sums.to(self._dtype))
        if bias is not None:
            x += bias

    def _gather(self, logits: Tensor) -> Tensor:
        if self._comm.size == 1:
            return logits[:, : self._vocab_size]
        gathered = self._comm.gather(logits.to(self._dtype))
        return logits if gathered is None else gathered[:, : self._vocab_size].float()

    def _layer(self, block: TransformerBlock) -> LayerStruct:
        attention, feed_forward = _fused(block)
        wo, w2 = cast(RowLinear, attention.wo), cast(RowLinear, feed_forward.w2)
        is_alone = self._comm.size == 1  # else a bias is added after the sum over the ranks
        return LayerStruct(
            wqkv=self._linear(attention.wqkv, attention.wqkv.bias),
            wo=self._linear(wo.linear, wo.bias if is_alone else None),
            w13=self._linear(feed_forward.w13, feed_forward.w13.bias),
            w2=self._linear(w2.linear, w2.bias if is_alone else None),
            attention_norm=self._weight(block.attention_norm),
            ffn_norm=self._weight(block.ffn_norm),
            qk_norm=None if attention.qk_norm is None else self._address(attention.qk_norm.weight),
        )

    def _linear(self, layer: Linear, bias: Tensor | None) -> LinearStruct:
        weight = layer.stored()
        assert weight is not None
        struct, kept = linear_struct(weight, None if bias is None else bias.float())
        self._kept += kept
        return struct

    def _weight(self, norm: nn.Module) -> int:
        return self._address(cast(Norm, norm).weight)

    def _address(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _destroy(kernels: Kernels, context: int) -> None:
    """Keeps the kernels' threads alive for as long as the context."""
    kernels.library.destroy_model(context)


def _fused(block: TransformerBlock) -> tuple[FusedAttention, FusedFeedForward]:
    return cast(FusedAttention, block.attention), cast(FusedFeedForward, block.feed_forward)


def _for_many_tokens(layer: Linear, kernels: Kernels, may_round: bool) -> Linear:
    weight = layer.stored()
    assert weight is not None
    if may_round and kernels.multiplies_batches(weight):
        return KernelLinear(weight, layer.bias, kernels)
    return WidenedLinear(weight, layer.bias, kernels) if isinstance(weight, QuantizedWeight) else layer
