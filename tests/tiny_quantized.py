"""Tiny models packed as GPTQ and AWQ by the definitions of these formats, and what quantized checkpoints compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.store.stored import MODEL_ARGS
from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.startup import load_engine
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.launch import Group
from tests.tiny_huggingface import edit_config
from tests.tiny_text import make_tokenizer_json

PROMPTS = [[5, 6, 7], list(range(40)), [1], [9, 8] * 11]
TOKENS = tuple(range(3, 43))
PLAN = StepPlan(1, (Chunk(0, 0, TOKENS, True),), tuple((0, index, index) for index in range(3)))
_AWQ_ROW_OF_FIELD = (0, 2, 4, 6, 1, 3, 5, 7)


def convert_to(source: Path, folder: Path, **options: Any) -> Path:
    """Convert with a tokenizer that fits any of the tiny models. The checkpoint."""
    tokenizer = folder.with_name(f"{folder.name}.tokenizer")
    tokenizer.mkdir(exist_ok=True)
    make_tokenizer_json(tokenizer)
    convert(str(source), str(tokenizer), None, str(folder), model_args_path=str(folder / MODEL_ARGS), **options)
    return folder


def engine_on(folder: Path, group: Group | None = None, compile: bool | str = "auto") -> Engine:
    """In float32."""
    group = Group(comm=SingleComm(), device=torch.device("cpu"), mesh=None) if group is None else group
    config = EngineConfig(max_seq_len=128, max_batch_size=4, dtype="float32", device="cpu", compile=compile)
    return load_engine(str(folder), ModelArgs.load_converted(folder / MODEL_ARGS), config, group)


def outputs_of(
    folder: Path, group: Group | None = None, compile: bool | str = "auto"
) -> tuple[Tensor | None, list[list[int]]]:
    """(logits of the last token of PLAN, greedy tokens of PROMPTS), of the leader."""
    engine = engine_on(folder, group, compile)
    logits = engine.runner.execute(PLAN)
    completions = engine.generate(PROMPTS, SamplingParams(max_new_tokens=16, temperature=0))
    return logits, [completion.token_ids for completion in completions]


def outputs_of_transformers(model: Any) -> tuple[Tensor, list[list[int]]]:
    """The same of a model in float32."""
    greedy = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        found = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None)
        greedy.append(found[0, len(prompt) :].tolist())
    return model(torch.tensor([TOKENS])).logits[:, -1], greedy


def quantize_folder(
    folder: Path, method: str, group_size: int, *, skipped: tuple[str, ...] = ("lm_head",), **config: Any
) -> dict[str, Tensor]:
    """Quantize the linear layers of a saved model in place: method is gptq, gptq_v2 or awq.

    skipped: ends of the names of linear layers that stay dense
    Returns s * (q - z) in float32, by transformers' names.
    """
    tensors = load_file(folder / "model.safetensors")
    dense = {}
    for name, weight in list(tensors.items()):
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or module.endswith(("embed_tokens", *skipped)):
            continue
        size = weight.size(1) if group_size == -1 else group_size
        levels, zeros, scales = _round_to_nearest(tensors.pop(name).float(), size)
        by_column = scales.float().repeat_interleave(size, 1), zeros.repeat_interleave(size, 1)
        dense[name] = by_column[0] * (levels - by_column[1])
        packed = _pack_awq(levels, zeros) if method == "awq" else _pack_gptq(levels, zeros, method == "gptq")
        tensors |= {f"{module}.{kind}": tensor for kind, tensor in packed.items()}
        tensors[f"{module}.scales"] = scales.t().contiguous()
        if method != "awq":
            tensors[f"{module}.g_idx"] = (torch.arange(weight.size(1)) // size).int()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    of_method = {
        "gptq": {"quant_method": "gptq", "desc_act": False, "sym": False},
        "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": False, "sym": False},
        "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
    }[method]
    edit_config(folder, quantization_config={"bits": 4, "group_size": group_size, **of_method, **config})
    return dense


def edit_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Set tensors of model.safetensors; None takes one away."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def in_two_files(folder: Path, ends: tuple[str, ...]) -> None:
    """Move the tensors with these ends of their names to a second file, and write the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{2 if name.endswith(ends) else 1}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _round_to_nearest(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(levels (out, in), zeros (out, groups) of 1..15, scales (out, groups) in float16)."""
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-4).half()
    zeros = (-low / scales).round().clamp(1, 15).int()
    levels = (groups / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return levels.clamp(0, 15).int().flatten(1), zeros, scales


def _pack_gptq(levels: Tensor, zeros: Tensor, less_one: bool) -> dict[str, Tensor]:
    stored = zeros - 1 if less_one else zeros
    return {"qweight": _words(levels.unflatten(1, (-1, 8)), 2).t().contiguous(), "qzeros": _by_rows(stored, range(8))}


def _pack_awq(levels: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    return {"qweight": _by_rows(levels, _AWQ_ROW_OF_FIELD), "qzeros": _by_rows(zeros, _AWQ_ROW_OF_FIELD)}


def _by_rows(values: Tensor, row_of_field: Any) -> Tensor:
    """(out, n) -> (n, out / 8): the fields of a word are eight rows."""
    return _words(values.t().unflatten(1, (-1, 8))[:, :, list(row_of_field)], 2)


def _words(fields: Tensor, dim: int) -> Tensor:
    """Eight fields along `dim` as one int32, the first in the lowest bits."""
    shifted = fields.long() << (4 * torch.arange(8))
    total = shifted.sum(dim)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()
