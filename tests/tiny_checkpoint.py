"""Tiny checkpoints in Meta's format, cut with torch.chunk and written with torch.save: an oracle without our code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from llama_tp.model_args import ModelArgs

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=16)
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 512,
    "multiple_of": 16,
    "norm_eps": 1e-5,
}
HIDDEN = 176
_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")


def meta_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random full tensors of ARGS under Meta's names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"tok_embeddings.weight": random(512, 64), "norm.weight": random(64), "output.weight": random(512, 64)}
    for layer in ("layers.0", "layers.1"):
        for name, shape in (("wq", (64, 64)), ("wk", (32, 64)), ("wv", (32, 64)), ("wo", (64, 64))):
            tensors[f"{layer}.attention.{name}.weight"] = random(*shape)
        for name, shape in (("w1", (HIDDEN, 64)), ("w2", (64, HIDDEN)), ("w3", (HIDDEN, 64))):
            tensors[f"{layer}.feed_forward.{name}.weight"] = random(*shape)
        tensors[f"{layer}.attention_norm.weight"] = random(64)
        tensors[f"{layer}.ffn_norm.weight"] = random(64)
    return tensors


def split_as_meta(tensors: dict[str, Tensor], num_shards: int, embedding_dim: int) -> list[dict[str, Tensor]]:
    """The shards that fairscale's layers would hold."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
    for name, tensor in tensors.items():
        kind = name.split(".")[-2]
        if tensor.dim() == 1:
            pieces = [tensor] * num_shards
        elif kind == "tok_embeddings":
            pieces = list(tensor.chunk(num_shards, embedding_dim))
        else:
            pieces = list(tensor.chunk(num_shards, 0 if kind in _ROWS else 1))
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    return shards


def write_meta(
    folder: Path,
    tensors: dict[str, Tensor],
    num_shards: int = 1,
    *,
    embedding_dim: int = 1,
    params: dict[str, object] | None = None,
) -> Path:
    """Write the shards and params.json. The folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, shard in enumerate(split_as_meta(tensors, num_shards, embedding_dim)):
        shard["rope.freqs"] = torch.ones(4)
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS if params is None else params))
    return folder


def params_of(args: ModelArgs) -> dict[str, object]:
    """params.json of an architecture, with keys of ours for what Meta's own models do not have."""
    ours = ("tied_embeddings", "max_seq_len", "max_batch_size")
    return {key: value for key, value in args.to_dict().items() if value is not None and key not in ours}


def write_checklist(folder: Path, *, prefix: str = "", name: str = "checklist.chk") -> None:
    """What Meta ships beside the shards: the output of md5sum, here of md5sum itself."""
    names = sorted(path.name for path in folder.iterdir())
    done = subprocess.run(["md5sum", *names], cwd=folder, capture_output=True, text=True, check=True)
    (folder / name).write_text(done.stdout.replace("  ", f"  {prefix}"))


def flip_bit(path: Path, position: int) -> None:
    """Change one bit of a file in place, as a bad disk would."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


class Evil:
    """Unpickled, it makes a file: proof that something was executed."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (str(self.proof), "w")
