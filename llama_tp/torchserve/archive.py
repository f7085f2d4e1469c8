"""Build a model folder for TorchServe with torch-model-archiver, as the README does by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from llama_tp.checkpoint.store.manifest import MANIFEST
from llama_tp.config_error import ConfigError
from llama_tp.model_args import ModelArgs
from llama_tp.text.siblings import CHAT_TEMPLATE
from llama_tp.text.tokenizer_files import copy_tokenizer, find_tokenizer
from llama_tp.torchserve.config import ModelConfig
from llama_tp.torchserve.programs import program


def build_archive(
    *,
    model_name: str,
    config_file: str | Path,
    checkpoint: str | Path,
    tokenizer: str | Path | None = None,
    handler: str | Path,
    model_store: str | Path,
    version: str = "1.0",
    overwrite: bool = False,
) -> Path:
    """Build model_store/model_name from a configuration, a converted checkpoint and a tokenizer (default: its own).

    The checkpoint's files are hard-linked if possible, else copied. An existing folder is replaced once the new one is
    complete; if it holds another checkpoint, which may be the only copy, only with `overwrite`. ValueError or OSError
    describes the problem before anything is written.
    """
    config = ModelConfig.load(config_file)
    checkpoint = Path(checkpoint)
    if not (checkpoint / "model_args.json").is_file():
        ModelArgs.load_converted(checkpoint / "model_args.json")  # the error describes the folder
    if not Path(handler).is_file():
        raise FileNotFoundError(f"{handler} does not exist")
    tokenizer = find_tokenizer(tokenizer or checkpoint, preferred=Path(config.handler.tokenizer_path).name)
    _check_paths(config, tokenizer)
    store = Path(model_store)
    target = store / model_name
    if not overwrite and _manifests(target) - _manifests(checkpoint):
        raise FileExistsError(
            f"{target} contains another checkpoint, which would be deleted; pass --overwrite to replace it, or a "
            "different --model_name"
        )
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".building.") as building:
        _run_archiver(model_name, version, handler, config_file, building)
        folder = Path(building, model_name)
        _add_files(folder, config, checkpoint, tokenizer)
        if target.exists():
            target.rename(Path(building, ".old"))
        folder.rename(target)
    return target


def build_referring_archive(
    *,
    model_name: str,
    config_file: str | Path,
    tokenizer: str | Path,
    chat_template: str | Path | None = None,
    handler: str | Path,
    model_store: str | Path,
    version: str = "1.0",
) -> Path:
    """Build model_store/model_name without weights: the configuration has the checkpoint's absolute path.

    `chat_template` replaces the tokenizer's. A folder of an earlier call is replaced; FileExistsError if there is one
    with a checkpoint. ValueError for a configuration that is wrong by itself.
    """
    ModelConfig.load(config_file)
    store = Path(model_store)
    target = store / model_name
    if _manifests(target):
        raise FileExistsError(f"{target} contains a checkpoint, which would be deleted; use another --run_dir")
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".building.") as building:
        _run_archiver(model_name, version, handler, config_file, building)
        folder = Path(building, model_name)
        copy_tokenizer(tokenizer, folder, name=Path(tokenizer).name)
        if chat_template is not None:
            shutil.copyfile(chat_template, folder / CHAT_TEMPLATE)
        if target.exists():
            target.rename(Path(building, ".old"))
        folder.rename(target)
    return target


def _check_paths(config: ModelConfig, tokenizer: Path) -> None:
    """ConfigError if the configuration names another tokenizer, or files outside of the model's folder."""
    handler = config.handler
    if (wanted := Path(handler.tokenizer_path).name) != tokenizer.name:
        raise ConfigError(
            [f"handler.tokenizer_path={wanted!r} but the tokenizer is {tokenizer.name!r}; make them agree"]
        )
    problems = [
        f"handler.{key}={value!r} must be a path below the model's folder"
        for key in ("converted_ckpt_dir", "tokenizer_path", "model_args_path")
        if (value := getattr(handler, key)) and not os.path.normpath(os.path.join("/m", value)).startswith("/m/")
    ]
    if problems:
        raise ConfigError(problems)


def _add_files(folder: Path, config: ModelConfig, checkpoint: Path, tokenizer: Path) -> None:
    """Put checkpoint, arguments and tokenizer where the configuration says."""
    handler = config.handler
    shutil.copytree(checkpoint, folder / handler.converted_ckpt_dir, copy_function=_link_or_copy)
    args_path, tokenizer_path = folder / (handler.model_args_path or "model_args.json"), folder / handler.tokenizer_path
    for path in (args_path, tokenizer_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint / "model_args.json", args_path)
    copy_tokenizer(tokenizer, tokenizer_path.parent, name=tokenizer_path.name)


def _manifests(folder: Path) -> set[bytes]:
    """The manifests of the checkpoints in a folder; equal manifests mean equal weights."""
    return {path.read_bytes() for path in folder.rglob(MANIFEST)}


def _run_archiver(model_name: str, version: str, handler: str | Path, config_file: str | Path, export: str) -> None:
    archiver = program("torch-model-archiver")
    command = [str(archiver), "--model-name", model_name, "--version", version, "--handler", str(handler)]
    command += ["--config-file", str(config_file), "--archive-format", "no-archive", "--export-path", export]
    # It works in a folder of TMPDIR with the model's name, which two archivers must not share.
    scratch = Path(export, ".scratch")
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        raise FileNotFoundError(f"{archiver} does not exist; install it: pip install 'llama-tp[serve]'") from None
    if done.returncode:
        raise ValueError(f"torch-model-archiver failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
    return target
