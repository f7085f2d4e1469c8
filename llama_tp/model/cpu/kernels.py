"""The compiled kernels of this process: their library, and the threads that run them."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch import Tensor

from llama_tp.model.cpu.library import Form, Library, LinearStruct
from llama_tp.model.norm import Norm
from llama_tp.model.quantization import QuantizedWeight
from llama_tp.model.weights import GROUP

_FORMS = {"int8": Form.INT8, "int8_groups": Form.INT8_GROUPS, "int4": Form.INT4}


class Kernels:
    """Functions of the library. OSError or AttributeError if the file at `path` is not one, RuntimeError if the threads
    cannot be started."""

    def __init__(self, path: Path, num_threads: int) -> None:
        self.library = Library(path)
        team = self.library.create_team(num_threads)
        if team is None:
            raise RuntimeError(f"{num_threads - 1} threads cannot be started")
        self.team: int = team
        self.num_threads = num_threads
        # Not at the interpreter's exit, when a daemon thread may still compute.
        weakref.finalize(self, self.library.destroy_team, team).atexit = False

    def multiply(self, weight: Tensor | QuantizedWeight, bias: Tensor | None, x: Tensor, *, may_round: bool) -> Tensor:
        """x W^T + b for x (T, in), all but W in float32.

        may_round: x may be rounded where that is faster, to bfloat16 or, with a scale for every few columns, to 8-bit
        integers. MemoryError if the threads' memory, which is kept, cannot be allocated.
        """
        struct, _ = linear_struct(weight, bias)
        y = torch.empty(x.size(0), weight.shape[0])
        x = x.contiguous()
        if not self.library.multiply(self.team, struct, x.data_ptr(), x.size(0), may_round, y.data_ptr()):
            raise MemoryError(f"a product of {x.size(0)} tokens and {x.size(1)} columns")
        return y

    def multiply_batch(self, weight: LinearStruct, x: Tensor, out: Tensor) -> None:
        """Write x W^T + b to out (T, out) for x (T, in), in bfloat16. T should be large; `in` is a multiple of 32.
        MemoryError as of `multiply`.

        With quantized weights, x is rounded to 8-bit integers, with a scale for every 64 columns.
        """
        assert x.is_contiguous()
        codes = torch.empty(self.library.bytes_of_codes(weight, x.size(0)), dtype=torch.uint8)
        ends = x.data_ptr(), x.size(0), codes.data_ptr(), out.data_ptr()
        if not self.library.multiply_batch(self.team, weight, *ends):
            raise MemoryError(f"a product of {x.size(1)} columns")

    def add_and_normalize(self, x: Tensor, y: Tensor | None, norm: Norm, *, zero_nonfinite: bool = False) -> Tensor:
        """x (T, D) in float32 += y, if given, which is bfloat16 or float32; then its norm, in the norm's dtype.

        zero_nonfinite: replace NaN and infinities by zero.
        """
        assert y is None or (y.is_contiguous() and y.dtype in (torch.bfloat16, torch.float32))
        out = torch.empty(x.shape, dtype=norm.dtype)
        self.library.add_and_normalize(
            self.team,
            norm.dtype == torch.bfloat16,
            y is not None and y.dtype == torch.bfloat16,
            *x.shape,
            x.data_ptr(),
            None if y is None else y.data_ptr(),
            norm.weight.data_ptr(),
            norm.eps,
            zero_nonfinite,
            out.data_ptr(),
        )
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """SwiGLU: silu of the first half of each row of gate_up (T, 2 F) times the second, (T, F)."""
        out = gate_up.new_empty(gate_up.size(0), gate_up.size(1) // 2)
        self.library.gate(self.team, out.dtype == torch.bfloat16, *out.shape, gate_up.data_ptr(), out.data_ptr())
        return out

    def multiplies_batches(self, weight: Tensor | QuantizedWeight) -> bool:
        """Whether `multiply_batch` is possible, and faster than PyTorch."""
        return bool(self.library.multiplies_batches(_form(weight))) and weight.shape[1] % GROUP == 0

    def widen(self, weight: LinearStruct, rows: slice, out: Tensor) -> None:
        """Write these rows of a quantized matrix to out, bfloat16 (rows, columns)."""
        self.library.widen(self.team, weight, rows.start, rows.stop, out.data_ptr())


def linear_struct(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> tuple[LinearStruct, list[Tensor]]:
    """A linear layer as the library sees it, and the tensors that it points to. bias: float32."""
    tensors: dict[str, Tensor | None] = {"bias": bias}
    if isinstance(weight, QuantizedWeight):
        tensors |= {"weight": weight.weight, "scales": weight.scales, "offsets": weight.offsets}
    else:
        tensors["weight"] = weight
    rows, columns = weight.shape
    struct = LinearStruct(form=_form(weight), rows=rows, columns=columns)
    kept = []
    for name, tensor in tensors.items():
        if tensor is not None:
            assert tensor.is_contiguous()
            setattr(struct, name, tensor.data_ptr())
            kept.append(tensor)
    offsets = tensors.get("offsets")
    struct.has_float32_offsets = offsets is not None and offsets.dtype == torch.float32
    return struct, kept


def _form(weight: Tensor | QuantizedWeight) -> Form:
    if isinstance(weight, QuantizedWeight):
        return _FORMS[weight.form]
    return Form.BFLOAT16 if weight.dtype == torch.bfloat16 else Form.FLOAT32
