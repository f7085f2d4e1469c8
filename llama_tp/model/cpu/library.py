"""The compiled library's interface: the structs of model.h and kernels.cpp, and its functions, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any, cast


class Form(IntEnum):
    """How a matrix is stored; the quantized forms are those of `llama_tp.model.quantization`."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT8_GROUPS = 3
    INT4 = 4


class LinearStruct(Structure):
    _fields_ = [
        ("form", c_int32),
        ("has_float32_offsets", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("bias", c_void_p),
    ]


class LayerStruct(Structure):
    _fields_ = [
        ("wqkv", LinearStruct),
        ("wo", LinearStruct),
        ("w13", LinearStruct),
        ("w2", LinearStruct),
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("qk_norm", c_void_p),
    ]


class ModelStruct(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("dim", "hidden", "heads", "kv_heads", "head_dim", "layers")),
        *((name, c_int32) for name in ("max_tokens", "max_parts", "is_bfloat16_cache", "may_round")),
        ("eps", c_float),
        ("team", c_void_p),
        ("layer", POINTER(LayerStruct)),
        ("norm", c_void_p),
        ("output", LinearStruct),
        ("cache", c_void_p),
        ("num_slots", c_int64),
    ]


class StepStruct(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "num_sampled", "num_sequences", "num_units", "num_blocks")),
        *(
            (name, c_void_p)
            for name in (
                "x",
                "rope",
                "sequences",
                "ranges",
                "blocks",
                "sampled",
                "partial_sums",
                "logits",
                "is_finite",
            )
        ),
    ]


PHASES_PER_LAYER = 5
PHASES_OF_ATTENTION = 3
PHASES_OF_OUTPUT = 2


class Library:
    """The functions of a compiled library. OSError or AttributeError if it is not one.

    They release Python's lock while they run.
    """

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))

        def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            declared: Any = getattr(functions, f"llama_tp_{name}")
            declared.restype, declared.argtypes = result, arguments
            return cast("Callable[..., Any]", declared)

        self.create_team = function("create_team", c_void_p, c_int32)
        self.destroy_team = function("destroy_team", None, c_void_p)
        self.can_compute = function("can_compute", c_int32, POINTER(ModelStruct))
        self.create_model = function("create_model", c_void_p, POINTER(ModelStruct))
        self.destroy_model = function("destroy_model", None, c_void_p)
        self.run = function("run", None, c_void_p, POINTER(StepStruct), c_int32, c_int32)
        self.multiply = function(
            "multiply", c_int32, c_void_p, POINTER(LinearStruct), c_void_p, c_int32, c_int32, c_void_p
        )
        self.multiply_batch = function(
            "multiply_batch", c_int32, c_void_p, POINTER(LinearStruct), c_void_p, c_int32, c_void_p, c_void_p
        )
        self.bytes_of_codes = function("bytes_of_codes", c_int64, POINTER(LinearStruct), c_int32)
        self.add_and_normalize = function(
            "add_and_normalize", None, c_void_p, *[c_int32] * 4, *[c_void_p] * 3, c_float, c_int32, c_void_p
        )
        self.attend = function("attend", None, c_void_p, c_int32, POINTER(StepStruct), c_void_p, c_void_p)
        self.gate = function("gate", None, c_void_p, *[c_int32] * 3, *[c_void_p] * 2)
        self.widen = function("widen", None, c_void_p, POINTER(LinearStruct), c_int64, c_int64, c_void_p)
        self.multiplies_batches = function("multiplies_batches", c_int32, c_int32)
        self.keys_per_part: int = function("keys_per_part", c_int32)()
        self.tokens_per_block: int = function("tokens_per_block", c_int32)()
