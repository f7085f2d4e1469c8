"""This rank's model, as local modules, with random weights instead of a checkpoint's: for measurements of speed."""

from __future__ import annotations

import torch
from torch import nn

from llama_tp.checkpoint.load import empty_model, parts_of, place
from llama_tp.model.memory import empty
from llama_tp.model.random_weights import RandomWeights
from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import PACKED, Layout, WeightFormats
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.agreement import agree
from llama_tp.parallel.apply import hold_shards, localize
from llama_tp.parallel.launch import Group
from llama_tp.parallel.sharding import Ranks


def random_model(
    args: ModelArgs,
    group: Group,
    dtype: torch.dtype,
    formats: WeightFormats,
    ranks: Ranks | None = None,
    layout: Layout = PACKED,
) -> Transformer:
    """As `load_model`, with linear layers in `formats`. Only one part of the model exists twice at a time.

    Quantized layers get random levels: nothing is quantized.
    """
    ranks = group.comm.size if ranks is None else ranks
    model = empty_model(args, group, dtype, ranks)
    hold_shards(model, ranks, group.comm.rank, formats)
    names = {part: name for name, part in parts_of(model)}
    weights = RandomWeights(group.device)

    def fill(part: nn.Module) -> None:
        _fill(part, names[part], weights, group.device)

    agree(lambda: localize(model, group.comm, formats, ranks, fill, layout))
    return model


def _fill(part: nn.Module, prefix: str, weights: RandomWeights, device: torch.device) -> None:
    """Replace the parameters of a part on the meta device."""
    place(part, list(part.named_parameters()), lambda size: empty((size,), torch.uint8, device))
    parameters = dict(part.named_parameters())
    for relative, parameter in parameters.items():
        is_int4 = f"{relative.rpartition('.')[0]}.offsets".removeprefix(".") in parameters
        weights.fill(f"{prefix}.{relative}", parameter.detach(), is_int4=is_int4)
