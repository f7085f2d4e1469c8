"""From a model's source to a model store that TorchServe can serve, on this machine.

The weights stay where they are, or in the cache of conversions: the archive has their path, the handler, the tokenizer
and a model-config.yaml for this machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llama_tp.config import EngineConfig
from llama_tp.engine.memory import ITEMSIZE
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.parallel.sharding import check_tp_size
from llama_tp.planning.configuration import configuration
from llama_tp.planning.estimate import Estimate
from llama_tp.planning.local import DEVICE_KINDS, LocalDevices, automatic_size, local_devices
from llama_tp.resources import HANDLER, resource
from llama_tp.torchserve.archive import build_referring_archive

if TYPE_CHECKING:
    from llama_tp.checkpoint.conversions import ConversionOptions
    from llama_tp.checkpoint.formats.reader import CheckpointReader

AUTO = "auto"
DTYPES = (AUTO, *ITEMSIZE)
_MODEL_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_OF_REQUESTS = ("max_new_tokens", "manual_seed", *(knob.name for knob in KNOBS))
"""Keys of `handler` left to the model's publisher and to each API's own defaults."""
_SERVED_NAME = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What to serve, and how. None: what suits the model and this machine."""

    source: str
    """A converted checkpoint, whatever `llama-tp convert` reads, or a repository on the hub."""
    model_name: str = "llama"
    """In URLs."""
    served_model_name: str | None = None
    """In requests and answers; None: a repository's name, else `model_name`."""
    tp: int | str | None = None
    """Number of ranks, or auto."""
    device: str = AUTO
    dtype: str = AUTO
    compile: bool | str = AUTO
    quantize: str | None = None
    """int8, int4 or none; None: as in the source."""
    max_batch_size: int | None = None
    max_seq_len: int | None = None
    speculative_tokens: int | None = None
    speculative_max_batch: int | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    """A file that replaces the model's own template."""
    api_key_file: str | None = None

    def __post_init__(self) -> None:
        """ValueError for what can be refused before anything is read."""
        if not _MODEL_NAME.fullmatch(self.model_name):
            raise ValueError(
                f"model_name={self.model_name!r} is part of URLs: it may have letters, digits, _, - and . only"
            )
        if self.served_model_name is not None and not _SERVED_NAME.fullmatch(self.served_model_name):
            raise ValueError(
                f"served_model_name={self.served_model_name!r} must have 1 to 200 visible ASCII characters, no spaces"
            )
        for name, value, choices in (("dtype", self.dtype, DTYPES), ("device", self.device, DEVICE_KINDS)):
            if value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
        if not (self.compile == AUTO or isinstance(self.compile, bool)):
            raise ValueError(f"compile={self.compile!r} must be one of {AUTO}, true, false")
        for name in ("max_batch_size", "max_seq_len", "speculative_max_batch"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        if self.speculative_tokens is not None and self.speculative_tokens < 0:
            raise ValueError(f"speculative_tokens={self.speculative_tokens} must be at least 0, which predicts none")
        if (isinstance(self.tp, str) and self.tp != AUTO) or (isinstance(self.tp, int) and self.tp < 1):
            raise ValueError(f"tp={self.tp!r} must be an integer of at least 1, or {AUTO}")
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise ValueError(f"chat_template={self.chat_template!r} is not a file")


def deploy(wanted: Deployment, store: Path) -> Path:
    """Build the archive store/model_name. ValueError or OSError, in one line, if the source cannot be served here."""
    path, hub_name = _on_this_machine(wanted.source)
    checkpoint = _converted(path, wanted)
    devices = local_devices(wanted.device)
    if wanted.served_model_name is None and hub_name is not None:
        wanted = replace(wanted, served_model_name=hub_name)
    tokenizer = _tokenizer(checkpoint, wanted)
    config = model_config(wanted, checkpoint, devices, tokenizer)
    store.mkdir(parents=True, exist_ok=True)
    config_file = store / f".{wanted.model_name}.yaml"
    config_file.write_text(config, encoding="utf-8")
    try:
        return build_referring_archive(
            model_name=wanted.model_name,
            config_file=config_file,
            tokenizer=tokenizer,
            chat_template=wanted.chat_template,
            handler=resource(HANDLER),
            model_store=store,
        )
    finally:
        config_file.unlink()


def model_config(wanted: Deployment, checkpoint: Path, devices: LocalDevices, tokenizer: Path) -> str:
    """The text of model-config.yaml for a converted checkpoint. ValueError if the model does not fit the devices."""
    estimate = _estimate(wanted, checkpoint, devices)
    name = wanted.served_model_name or wanted.model_name
    config: dict[str, Any] = yaml.safe_load(configuration(estimate, model=name, tokenizer=tokenizer.name, threads=1))
    del config["torchrun"]["OMP_NUMBER_THREADS"]  # by default a rank's share of the cores
    handler = {key: value for key, value in config["handler"].items() if key not in _OF_REQUESTS}
    handler |= {
        "converted_ckpt_dir": str(checkpoint),
        "model_args_path": None,
        "dtype": wanted.dtype,
        "compile": wanted.compile,
        "served_model_name": wanted.served_model_name,
        "api_key_file": wanted.api_key_file,
    }
    for name in ("speculative_tokens", "speculative_max_batch"):
        if (number := getattr(wanted, name)) is not None:
            handler[name] = number
    config["handler"] = handler
    head = "# Written by `llama-tp serve` at every start: change the options of the command, not this file.\n"
    return head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _estimate(wanted: Deployment, checkpoint: Path, devices: LocalDevices) -> Estimate:
    """For the largest batch that fits, if none is asked for."""
    from llama_tp.checkpoint.formats.quantized import formats_of_reader
    from llama_tp.checkpoint.inspection import open_any

    reader = open_any(checkpoint)
    args = reader.args
    size = _size(wanted.tp, args.n_heads, devices)
    check_tp_size(args, size)
    max_seq_len = wanted.max_seq_len or args.max_seq_len
    if reason := args.why_too_long(max_seq_len):
        raise ValueError(reason)
    batch = wanted.max_batch_size or args.max_batch_size
    dtype = _dtype(wanted.dtype, reader, devices, batch)

    def estimate(batch: int) -> Estimate:
        config = EngineConfig(
            max_seq_len=max_seq_len,
            max_batch_size=batch,
            max_batched_tokens=max(EngineConfig().max_batched_tokens, batch),
        )
        formats = formats_of_reader(reader)
        return Estimate(args, devices.device, size, dtype, config, max(1, max_seq_len // 2), formats)

    found = estimate(batch)
    if found.max_batch < 1:
        raise ValueError(
            f"the model does not fit: {found.needs.weights / 2**30:.1f} GiB of weights on each of {size} rank(s), and "
            f"one request of max_seq_len={max_seq_len}, need more than the {found.memory / 2**30:.1f} GiB of "
            f"{devices.device.name}; reduce --max-seq-len, or use --quantize int4 or more devices"
        )
    return found if wanted.max_batch_size or found.fits else estimate(found.max_batch)


def _size(tp: int | str | None, n_heads: int, devices: LocalDevices) -> int:
    num_gpus = 0 if devices.device.type == "cpu" else devices.count
    if tp is None or isinstance(tp, str):
        return automatic_size(n_heads, num_gpus)
    if num_gpus and tp > num_gpus:
        raise ValueError(f"tp={tp}, but this machine has {num_gpus} GPU(s); reduce it")
    return tp


def _dtype(dtype: str, reader: CheckpointReader, devices: LocalDevices, batch: int) -> str:
    """What `auto` will be. Of a GPU, the checkpoint's."""
    import torch

    from llama_tp.checkpoint.load import resolve_dtype

    stored = reader.dtype
    if dtype == AUTO and devices.device.type == "cpu":
        stored = resolve_dtype(AUTO, stored, torch.device("cpu"), batch)
    return str(stored).removeprefix("torch.") if dtype == AUTO else dtype


def _on_this_machine(source: str) -> tuple[Path, str | None]:
    """The path of a source, and its repository if it was downloaded."""
    if os.path.lexists(source):
        return Path(source).resolve(), None
    from llama_tp.checkpoint.hub.download import download, parse_hub_id
    from llama_tp.user_cache import cache_folder

    if (hub_id := parse_hub_id(source)) is None:
        raise ValueError(f"there is no {source}; give a folder, a GGUF file, or a repository on the hub (owner/name)")
    try:
        return Path(download(hub_id[0], revision=hub_id[1], output=str(cache_folder() / "hub"))), hub_id[0]
    except ValueError as error:
        raise ValueError(f"there is no path {source} here, so it was looked for on the hub: {error}") from None


def _converted(path: Path, wanted: Deployment) -> Path:
    from llama_tp.checkpoint.conversions import converted
    from llama_tp.checkpoint.store.stored import is_stored

    if not is_stored(path):
        return converted(path, _options(wanted))
    if wanted.quantize is not None:
        raise ValueError(
            f"quantize={wanted.quantize!r}, but {path} is converted already; give the original weights, or "
            "quantize them with `llama-tp convert`"
        )
    return path


def _options(wanted: Deployment) -> ConversionOptions:
    """The dtype is no option of the conversion: weights are kept as they are, and rounded when they are loaded."""
    from llama_tp.checkpoint.conversions import ConversionOptions

    tokenizer = None if wanted.tokenizer is None else str(Path(wanted.tokenizer).resolve())
    return ConversionOptions(quantize=wanted.quantize, tokenizer=tokenizer)


def _tokenizer(checkpoint: Path, wanted: Deployment) -> Path:
    """The tokenizer's file: the one that was asked for, the checkpoint's, or one beside the checkpoint."""
    from llama_tp.text.tokenizer_files import find_tokenizer

    try:
        return find_tokenizer(wanted.tokenizer or checkpoint)
    except FileNotFoundError:
        if wanted.tokenizer:
            raise
    try:
        return find_tokenizer(checkpoint.parent)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no tokenizer in {checkpoint} or next to it; pass --tokenizer") from None
