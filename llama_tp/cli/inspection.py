"""`llama-tp inspect`: what a checkpoint is, as text or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_tp.checkpoint.inspection import Inspection

_SIZES = (1, 2, 4, 8)
"""The numbers of ranks for which memory is printed."""


def inspect(source: str, json: bool = False) -> None:
    """Describe Meta's shards, a Hugging Face model, a GGUF file or a converted checkpoint, without reading its weights.

    Args:
        source: the folder or file
        json: print one JSON object, with sizes in bytes
    """
    from llama_tp.checkpoint.inspection import inspect_checkpoint

    if not isinstance(json, bool):
        raise ValueError(f"json={json!r} must be True or False, or have no value")
    found = inspect_checkpoint(source)
    memory = _memory(found)
    if json:
        content = {name: value for name, value in asdict(found).items() if name != "formats"}
        print(dumps({**content, "memory_per_rank": memory}, ensure_ascii=False))
        return
    for label, value in _lines(found):
        print(f"{label:<14}{value}".rstrip())
    print(f"\nMemory of the busiest rank, on a GPU and in {found.dtype}:")
    print(f"{'ranks':>6} {'weights':>12} {'KV cache of a token':>21} {f'... of {found.args.max_seq_len} tokens':>24}")
    for row in memory:
        weights, token = row["weights"], row["kv_cache_per_token"]
        whole = token * found.args.max_seq_len
        print(f"{row['ranks']:>6} {weights / 2**30:>8.2f} GiB {token / 2**10:>17.1f} KiB {whole / 2**20:>20.1f} MiB")


def _lines(found: Inspection) -> list[tuple[str, str]]:
    args = found.args
    limit = "no limit known" if args.context_limit is None else f"at most {args.context_limit} tokens"
    tokenizer = f"{found.tokenizer}, {found.tokens} tokens" if found.tokenizer else "none"
    size = f"{found.num_bytes / 1e9:.2f} GB" if found.num_bytes >= 10**9 else f"{found.num_bytes / 1e6:.1f} MB"
    lines = [
        ("format", found.format),
        ("architecture", f"{args.n_layers} layers of dim {args.dim}, feed-forward {args.hidden_dim}"),
        ("attention", f"{args.n_heads} heads of {args.head_dim}, {args.n_kv_heads} kv heads"),
        ("embedding", f"{args.vocab_size} rows"),
        ("rotation", f"theta {args.rope_theta:g}"),
        ("features", "; ".join(found.features) or "those of every Llama"),
        ("parameters", f"{found.parameters / 1e9:.2f} billion in {found.tensors} tensors, {found.dtype}"),
        ("quantized", ", ".join(_layers(count, form) for form, count in found.quantized.items()) or "no"),
        ("on disk", f"{size} in {found.files} file{'s' if found.files != 1 else ''}"),
        ("tokenizer", tokenizer),
        ("chat format", found.chat_format or "none"),
        ("context", f"{limit}; max_seq_len is {args.max_seq_len}"),
    ]
    notes = found.notes or ("none",)
    return [*lines, *((label, note) for label, note in zip(("notes", *[""] * len(notes)), notes, strict=False))]


def _layers(count: int, form: str) -> str:
    return f"{count} linear layer{'s' if count != 1 else ''} in {form}"


def _memory(found: Inspection) -> list[dict[str, Any]]:
    """Bytes of the busiest rank, as `plan` has them."""
    from llama_tp.planning.needs import GroupNeeds

    sizes = [size for size in _SIZES if size <= found.args.n_heads]
    groups = [(size, GroupNeeds.of(found.args, size, found.dtype, "cuda", found.formats)) for size in sizes]
    return [{"ranks": size, "weights": group.weights, "kv_cache_per_token": group.kv_token} for size, group in groups]
