"""`llama-tp plan`: how many devices a model needs, how fast they can be at best, and the configuration for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_tp.model.weights import WeightFormats
    from llama_tp.model_args import ModelArgs
    from llama_tp.parallel.sharding import Ranks
    from llama_tp.planning.advice import Advice
    from llama_tp.planning.devices import Device
    from llama_tp.planning.estimate import Estimate


def plan(
    model: str,
    *,
    tp: int | str | None = None,
    tp_shares: tuple[int, ...] | None = None,
    device: str = "h100",
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    context: int | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    memory: str | None = None,
    bandwidth: float | None = None,
    max_ranks: int = 16,
    json: bool = False,
    write: str | None = None,
    overwrite: bool = False,
) -> None:
    """Print how many devices a model needs, what fits on them, and the least time per token.

    Needs neither weights nor a GPU. Speeds are upper bounds: what memory bandwidth, arithmetic and all-reduces allow.

    Args:
        model: name of a published model such as llama2-70b; or model_args.json, params.json, or a checkpoint of any
            format (Meta, Hugging Face, GGUF, converted)
        tp: tensor-parallel size to print in detail, or "auto" for the recommended one; without it, a table of all sizes
        tp_shares: query heads of each rank, such as 24,24,16, instead of equal shares
        device: h100, h200, a100-40, a100-80, l4, l40s, a10, rtx3090, rtx4090, rtx5090, mi300x, or cpu for this host
        max_batch_size: requests at the same time; by default the model's
        max_seq_len: prompt plus answer of a request, in tokens; by default the model's
        context: tokens that a request has in the cache on average, for speeds; by default half of max_seq_len
        dtype: bfloat16, float16 or float32; auto is the checkpoint's, and bfloat16 without one
        quantize: int8 or int4, as by `llama-tp convert --quantize`; by default as in the checkpoint
        memory: memory of each device, such as 24GiB, instead of the device's own
        bandwidth: GB/s that each device reads, instead of the device's own
        max_ranks: largest size to consider
        json: print one JSON object, with sizes in bytes and times in seconds
        write: path of a model-config.yaml to write for this size, or for the recommended one
        overwrite: replace the file to write
    """
    from llama_tp.planning.advice import advise
    from llama_tp.planning.report import details, document, table

    _check_switches(json=json, overwrite=overwrite)
    _check_counts(max_batch_size=max_batch_size, max_seq_len=max_seq_len, context=context, max_ranks=max_ranks)
    args, found_dtype, formats = _quantized(*_architecture(model), quantize)
    groups: Sequence[Ranks] = _sizes(args, tp, max_ranks) if tp_shares is None else [_shares(args, tp, tp_shares)]
    estimates = list(
        _estimates(
            args,
            _device(device, memory, bandwidth),
            _dtype(found_dtype if dtype == "auto" else dtype),
            (max_batch_size, max_seq_len, context),
            groups,
            formats,
        )
    )
    name = _title(model)
    advice = advise(name, estimates)
    chosen = estimates[0] if tp_shares is not None else _chosen(estimates, tp, advice)
    if json:
        shown = estimates if chosen is None else [chosen]
        print(dumps(document(name, shown, advice), ensure_ascii=False))
    else:
        print("\n".join(table(name, estimates) if chosen is None else details(name, chosen)))
        print(f"\n{advice.text}")
    if write is not None:
        _write(write, chosen or _recommended(estimates, advice), model, overwrite=overwrite)


def _check_switches(**switches: object) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False, or have no value")


def _check_counts(**counts: object) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def _dtype(name: str) -> str:
    from llama_tp.engine.memory import ITEMSIZE

    if name not in ITEMSIZE:
        raise ValueError(f"dtype={name!r} must be one of auto, {', '.join(ITEMSIZE)}")
    return name


def _architecture(model: str) -> tuple[ModelArgs, str, WeightFormats]:
    """The model's architecture, the dtype of its weights if there are any, else bfloat16, and its quantized layers."""
    from llama_tp.model.published import PUBLISHED, published
    from llama_tp.model_args import ModelArgs

    if model in PUBLISHED:
        return PUBLISHED[model], "bfloat16", {}
    path = Path(model)
    if path.suffix == ".json":
        args = ModelArgs.load_converted(path)
        if args.quantization_group > 1:
            raise ValueError(f"{path} is of a quantized model, without its weights: pass the checkpoint's folder")
        return args, "bfloat16", {}
    if not path.exists():
        try:
            published(model)
        except ValueError as error:
            raise ValueError(f"{error}; nor is there a file or folder of this name") from None
    from llama_tp.checkpoint.formats.quantized import formats_of_reader
    from llama_tp.checkpoint.inspection import open_any

    reader = open_any(path)
    return reader.args, str(reader.dtype).removeprefix("torch."), formats_of_reader(reader)


def _quantized(
    args: ModelArgs, dtype: str, formats: WeightFormats, quantize: str | None
) -> tuple[ModelArgs, str, WeightFormats]:
    """The same after `llama-tp convert --quantize`."""
    from llama_tp.model.weights import quantized_args, quantized_formats

    if quantize is None:
        return args, dtype, formats
    if formats:
        raise ValueError(f"quantize={quantize!r}, but the model is quantized already; leave it out")
    return quantized_args(args), dtype, quantized_formats(args, quantize)


def _device(name: str, memory: str | None, bandwidth: float | None) -> Device:
    from llama_tp.config import parse_memory
    from llama_tp.planning.devices import find_device

    device = find_device(name)
    if memory is not None:
        try:
            size = parse_memory(memory)
        except ValueError as error:
            raise ValueError(f"memory={memory!r} {error}") from None
        if isinstance(size, float):
            raise ValueError(f"memory={memory!r} must be a size such as 24GiB")
        device = replace(device, memory=size)
    if bandwidth is not None:
        if isinstance(bandwidth, bool) or not isinstance(bandwidth, (int, float)) or not 0 < bandwidth < float("inf"):
            raise ValueError(f"bandwidth={bandwidth!r} must be a number of GB/s above 0")
        device = replace(device, bandwidth=bandwidth * 1e9)
    return device


def _sizes(args: ModelArgs, tp: int | str | None, max_ranks: int) -> range:
    """The sizes to consider: up to the one asked for, at least."""
    from llama_tp.parallel.sharding import check_tp_size

    if tp is None or tp == "auto":
        return range(1, min(max_ranks, args.n_heads) + 1)
    if isinstance(tp, bool) or not isinstance(tp, int):
        raise ValueError(f"tp={tp!r} must be an integer, or auto")
    check_tp_size(args, tp)
    return range(1, max(tp, min(max_ranks, args.n_heads)) + 1)


def _shares(args: ModelArgs, tp: int | str | None, shares: object) -> tuple[int, ...]:
    """Of ranks that are not equal."""
    from llama_tp.parallel.sharding import check_tp_size

    if not isinstance(shares, (tuple, list)) or not all(type(share) is int for share in shares):
        raise ValueError(f"tp_shares={shares!r} must be the query heads of each rank, such as 24,24,16")
    if tp is not None and tp != len(shares):
        raise ValueError(f"tp={tp!r}, but tp_shares has {len(shares)} shares; leave --tp out")
    check_tp_size(args, tuple(shares))
    return tuple(shares)


def _estimates(
    args: ModelArgs,
    device: Device,
    dtype: str,
    limits: tuple[int | None, int | None, int | None],
    groups: Sequence[Ranks],
    formats: WeightFormats,
) -> Iterator[Estimate]:
    """One for each group. `limits`: max_batch_size, max_seq_len and context; None for defaults."""
    from llama_tp.config import EngineConfig
    from llama_tp.planning.estimate import Estimate

    max_seq_len = limits[1] or args.max_seq_len
    context = limits[2] or max(1, max_seq_len // 2)
    if reason := args.why_too_long(max_seq_len):
        raise ValueError(reason)
    if context > max_seq_len:
        raise ValueError(f"context={context} must be at most max_seq_len={max_seq_len}; reduce the former")
    max_batch_size = limits[0] or args.max_batch_size
    config = EngineConfig(
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        max_batched_tokens=max(EngineConfig().max_batched_tokens, max_batch_size),
    )
    for ranks in groups:
        yield Estimate(args, device, ranks, dtype, config, context, formats)


def _title(model: str) -> str:
    path = Path(model)
    return (path.parent.name if path.suffix == ".json" and path.parent.name else path.name) or model


def _chosen(estimates: Sequence[Estimate], tp: int | str | None, advice: Advice) -> Estimate | None:
    """The size to print in detail; None for a table."""
    if tp is None:
        return None
    return _recommended(estimates, advice) if tp == "auto" else next(one for one in estimates if one.size == tp)


def _recommended(estimates: Sequence[Estimate], advice: Advice) -> Estimate:
    if advice.size is None:
        raise ValueError(advice.text)
    return next(one for one in estimates if one.size == advice.size)


def _write(path: str, estimate: Estimate, model: str, *, overwrite: bool) -> None:
    """Write model-config.yaml, and say so on stderr."""
    from llama_tp.planning.configuration import configuration, write_configuration
    from llama_tp.threads import available_cores

    if estimate.max_batch < 1:
        raise ValueError(
            f"tp={estimate.size} {estimate.device.name} cannot hold one request of "
            f"max_seq_len={estimate.config.max_seq_len}, so no configuration was written; use more ranks, or reduce it"
        )
    threads = max(1, available_cores() // estimate.size) if estimate.device.ranks_share_it else 1
    text = configuration(estimate, model=_title(model), tokenizer=_tokenizer_name(model), threads=threads)
    write_configuration(text, path, overwrite=overwrite)
    print(f"Wrote {path} for {estimate.size} rank{'s' if estimate.size > 1 else ''}", file=sys.stderr)
    if estimate.size > estimate.device.per_host and not estimate.device.ranks_share_it:
        print(
            f"A host usually has {estimate.device.per_host} of {estimate.device.name}; over several hosts, divide "
            "nproc-per-node and set nnodes and rdzv-endpoint (docs/several-hosts.md)",
            file=sys.stderr,
        )


def _tokenizer_name(model: str) -> str:
    """The tokenizer's file: that beside the checkpoint, else what this family is published with."""
    from llama_tp.text.tokenizer_files import find_tokenizer

    path = Path(model)
    try:
        return find_tokenizer(path if path.is_dir() else path.parent).name if path.exists() else _published_name(model)
    except FileNotFoundError:
        return "tokenizer.model"


def _published_name(model: str) -> str:
    return "tokenizer.model" if model.startswith("llama") else "tokenizer.json"
