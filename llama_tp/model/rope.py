"""Rotary position embedding in Meta's layout: adjacent elements (0, 1), (2, 3), ... of a head form pairs.

Legend: T tokens, H heads, d head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_tp.model_args import ModelArgs, RopeScaling


def rope_table(args: ModelArgs, max_seq_len: int, device: torch.device | str) -> Tensor:
    """e^(i * position * frequency) for every position: complex64, (max_seq_len, d / 2)."""
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents
    if args.rope_scaling is not None:
        freqs = scale_frequencies(freqs, args.rope_scaling)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def scale_frequencies(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Linear: stretch all wavelengths by `factor`. Llama 3.1: stretch long ones, keep short ones, interpolate in
    between."""
    if scaling.kind == "linear":
        return freqs / scaling.factor
    wavelengths = 2 * math.pi / freqs
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((scaling.original_max_seq_len / wavelengths - low) / (high - low)).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / scaling.factor


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair of x (T, H, d) by its token's angle, in float32; rope is (T, 1, d / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (T, H, d / 2)
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)
