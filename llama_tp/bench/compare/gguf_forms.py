"""A GGUF file with its matrices in another form, for engines that read GGUF: the same weights, quantized again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

_FILE_TYPE = "general.file_type"
_FILE_TYPES = {"bf16": 32, "Q8_0": 7, "Q4_1": 3}
"""llama.cpp's numbers for what most tensors of a file are (llama.h, llama_ftype)."""
_OUTPUT = ("token_embd.weight", "output.weight")
"""Never in 4 bits: 8, as llama.cpp's own files have it, and ours."""


def is_in_form(path: Path, form: str) -> bool:
    """Whether most matrices of a file are in this form already."""
    import gguf

    kinds = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
    return kinds.most_common(1)[0][0] == form.upper()


def write_in_form(source: Path, destination: Path, form: str) -> None:
    """Write `source` with all matrices in `form`: bf16, Q8_0 or Q4_1."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(destination, architecture)
    for field in reader.fields.values():
        _copy_field(writer, field, form)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = _kind(tensor, form)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_field(writer: Any, field: Any, form: str) -> None:
    import gguf

    if field.name.startswith("GGUF.") or field.name == "general.architecture":  # of the file itself
        return
    value = _FILE_TYPES[form] if field.name == _FILE_TYPE else field.contents()
    kind = field.types[0]
    if kind == gguf.GGUFValueType.ARRAY:
        writer.add_key_value(field.name, value, kind, sub_type=field.types[-1])
    else:
        writer.add_key_value(field.name, value, kind)


def _kind(tensor: Any, form: str) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(tensor.shape) == 1:
        return kinds.F32
    return kinds.Q8_0 if form == "Q4_1" and tensor.name in _OUTPUT else kinds[form.upper()]
