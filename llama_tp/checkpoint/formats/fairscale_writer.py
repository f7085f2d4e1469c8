"""Writes Meta's own format, for Meta's own code: consolidated.NN.pth, params.json and checklist.chk.

What that code would compute otherwise is refused by name (https://github.com/meta-llama/llama, llama/model.py;
https://github.com/meta-llama/llama3, the same; https://github.com/meta-llama/llama-models, for the scaled rotation).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llama_tp.checkpoint.formats.checklist import write_checklist
from llama_tp.checkpoint.formats.fairscale import EMBEDDING, OUTPUT, SliceOfTensor
from llama_tp.checkpoint.formats.reader import CheckpointReader
from llama_tp.checkpoint.formats.safetensors_writer import Layout
from llama_tp.checkpoint.formats.torch_file_writer import write_torch_file
from llama_tp.checkpoint.progress import Advance
from llama_tp.checkpoint.store.hashing_file import HashingFile
from llama_tp.checkpoint.store.manifest import FileEntry
from llama_tp.model_args import ModelArgs, RopeScaling, meta_rope_factor
from llama_tp.text.tokenizer import Tokenizer

_MAX_SHARDS = 100
"""Their names have two digits."""
_LLAMA_2_THETA = 10000.0
_DEFAULT_ROPE_FACTOR = 8.0
"""Of use_scaled_rope in Meta's code."""
_USUAL_MULTIPLE = 256


class FairscaleWriter:
    """A CheckpointWriter of Meta's shards. Holds one block of rows, or a shard of one tensor that is cut in columns."""

    def __init__(self, reader: CheckpointReader, tokenizer: Tokenizer | None, model_parallel_size: int) -> None:
        _check_expressible(reader.args)
        _check_shards(reader.args, model_parallel_size)
        self._reader = reader
        self._ranks = model_parallel_size
        # Llama 2's code, which is that for sentencepiece, splits the embedding on the hidden dim, Llama 3's on the
        # vocabulary. Of tied embeddings the output is the same tensor, which either splits on the vocabulary.
        is_llama_2 = tokenizer is not None and tokenizer.kind == "sentencepiece" and not reader.args.tied_embeddings
        self._embedding_dim = 1 if is_llama_2 else 0

    def write(self, folder: Path, advance: Advance) -> Mapping[str, FileEntry]:
        files: dict[str, FileEntry] = {}
        md5s: dict[str, str] = {}
        for rank in range(self._ranks):
            name = f"consolidated.{rank:02d}.pth"
            with HashingFile(folder / name, also_md5=True) as file:
                self._write_shard(file, rank, advance)
            files[name], md5s[name] = file.entry, file.md5
        (folder / "params.json").write_text(json.dumps(meta_params(self._reader.args)) + "\n")
        write_checklist(folder, md5s)
        return files

    def _write_shard(self, file: HashingFile, rank: int, advance: Advance) -> None:
        tensors = self._reader.tensors
        slices = {
            name: SliceOfTensor.of_rank(name, source, rank, self._ranks, self._embedding_dim)
            for name, source in tensors.items()
        }
        layouts = {name: Layout(one.shape, one.source.dtype) for name, one in slices.items()}

        def blocks(name: str) -> Iterator[Tensor]:
            for block in slices[name].blocks():
                yield block
                advance(block.nbytes)

        # Meta's code has an output of its own: of tied embeddings, torch.save stores both once.
        same = {OUTPUT: EMBEDDING} if self._reader.args.tied_embeddings else {}
        write_torch_file(file, layouts, blocks, same)


def meta_params(args: ModelArgs) -> dict[str, Any]:
    """params.json with the keys that Meta's model of this kind has: fewer for Llama 1 and 2, whose code has fewer."""
    multiple_of, multiplier = _ffn_rule(args)
    params: dict[str, Any] = {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads}
    if args.n_kv_heads != args.n_heads:
        params["n_kv_heads"] = args.n_kv_heads
    params |= {"vocab_size": args.vocab_size, "multiple_of": multiple_of}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params["norm_eps"] = args.norm_eps
    if args.rope_theta != _LLAMA_2_THETA or args.rope_scaling is not None:
        params["rope_theta"] = args.rope_theta
    if args.rope_scaling is not None:
        params["use_scaled_rope"] = True
        if meta_rope_factor(args.dim, args.n_layers) is None:
            params["rope_scaling_factor"] = args.rope_scaling.factor
    return params


def _ffn_rule(args: ModelArgs) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give the FFN hidden size by Meta's rule, whatever it is."""
    if args.ffn_hidden_dim is None:
        return args.multiple_of, args.ffn_dim_multiplier
    hidden = args.ffn_hidden_dim
    multiple_of = math.gcd(hidden, _USUAL_MULTIPLE)
    middle = (hidden - multiple_of / 2 + 1) / int(2 * (4 * args.dim) / 3)  # of what is rounded up to hidden
    for multiplier in (None, *(round(middle, digits) for digits in range(1, 18))):
        rule = replace(args, ffn_hidden_dim=None, multiple_of=multiple_of, ffn_dim_multiplier=multiplier or None)
        if rule.hidden_dim == hidden:
            return multiple_of, multiplier
    raise AssertionError(f"no ffn_dim_multiplier gives {hidden}")


def _check_expressible(args: ModelArgs) -> None:
    """ValueError names all that Meta's code does not compute."""
    odd = [f"{name}=true" for name in ("qkv_bias", "wo_bias", "ffn_bias", "qk_norm") if getattr(args, name)]
    if args.head_dim * args.n_heads != args.dim:
        odd.append(f"a head size of {args.head_dim} (not dim / n_heads)")
    if args.context_limit is not None:
        odd.append(f"context_limit={args.context_limit} (a sliding window or dynamic rotary frequencies)")
    if (scaling := args.rope_scaling) is not None:
        factor = meta_rope_factor(args.dim, args.n_layers) or _DEFAULT_ROPE_FACTOR
        if scaling != RopeScaling(factor=factor):
            fields = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len)
            odd.append(f"rope_scaling of kind {scaling.kind} with {', '.join(f'{field:g}' for field in fields)}")
    if odd:
        raise ValueError(
            f"Meta's format cannot express {', '.join(odd)}: Meta's code would compute another model; use --format hf"
        )


def _check_shards(args: ModelArgs, ranks: int) -> None:
    counts = {name: getattr(args, name) for name in ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size")}
    legal = [
        size for size in range(1, min(args.n_kv_heads, _MAX_SHARDS) + 1) if not any(n % size for n in counts.values())
    ]
    if ranks in legal:
        return
    undivided = [f"does not divide {name}={n}" for name, n in counts.items() if ranks > 0 and n % ranks]
    reason, sizes = (undivided or ["is out of range"])[0], ", ".join(map(str, legal))
    raise ValueError(f"model_parallel_size={ranks} {reason}; legal sizes for this model: {sizes}")
