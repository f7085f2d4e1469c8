"""RMSNorm for inference: no gradient, with the weight prepared once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, from float32 (T, D) to the weight's dtype (arXiv:1910.07467)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.eps = eps
        wide = weight.detach().float()
        self.weight = wide
        """Float32 (D,)."""
        self._scaled = wide * math.sqrt(weight.numel())
        self._floor = wide.new_tensor(math.sqrt(weight.numel() * eps))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(self.dtype)
        # Fewer passes and operators than F.rms_norm: sqrt(D (mean + eps)) is the hypotenuse of |x| and a constant.
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(size, self._floor)).mul_(self._scaled).to(self.dtype)


class HeadNorm(nn.Module):
    """The same for each head by itself, with a weight of its own: x (T, H, d), weight (H, d)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.eps = eps
        self.weight = weight.detach().float()
        """Float32 (H, d)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape[-1:], eps=self.eps).mul_(self.weight).to(self.dtype)
