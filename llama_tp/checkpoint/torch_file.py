"""What of a file of torch.save is loaded, and our wording for a refusal: never "set weights_only to False"."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path

_MAX_PICKLE_BYTES = 16 << 20
"""Of the list of tensors in a file. That of the largest model of Meta has 0.2 MB."""
_GLOBALS = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2", "torch Size"}
)
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT", "PUT"), ("BINGET", "LONG_BINGET", "GET")
_STORAGE = re.compile(r"torch (\w+Storage|bfloat16|float16|float32)")


def why_not_loaded(error: Exception) -> str:
    """One line for the exception of a `torch.load(weights_only=True)`, to follow the file name."""
    # Other errors, such as that for a TorchScript archive, also give that advice.
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            return f"is refused, nothing in it was executed: it needs {wanted[1]}, which weights never need"
        return "is corrupt or unsafe, nothing in it was executed: it contains more than tensors"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return f"is truncated or corrupt ({reason})"


class UnsafeFile(ValueError):
    """A pickle that is more than a list of tensors."""


def check_torch_file(path: Path) -> None:
    """ValueError, to follow the file name, for a zip archive with more in its pickle than tensors by their names.

    torch.load with weights_only executes nothing of a file, but a small file can still make it allocate any number of
    bytes (a bytearray of a given length) or never return (tuples of tuples, each twice, as the key of a dict).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("has compressed entries, which torch.save does not write")
            for entry in entries:
                if entry.filename.lower().endswith("/data.pkl"):  # torch's reader takes either case
                    _check_pickle(archive.read(entry) if entry.file_size <= _MAX_PICKLE_BYTES else None)
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"is truncated or corrupt ({error})") from None


def _check_pickle(data: bytes | None) -> None:
    if data is None:
        raise ValueError(f"is refused: its list of tensors has more than {_MAX_PICKLE_BYTES} bytes")
    tuples: set[str] = set()
    was_tuple = False
    try:
        for code, found, _ in pickletools.genops(data):
            argument = str(found)
            if code.name == "GLOBAL" and argument not in _GLOBALS and not _STORAGE.fullmatch(argument):
                name = argument.replace(" ", ".")
                raise UnsafeFile(f"is refused, nothing in it was executed: it needs {name}, which weights never need")
            if is_put := was_tuple and code.name in _PUTS:
                tuples.add(argument)
            if code.name in _GETS and argument in tuples:
                raise UnsafeFile("is refused, nothing in it was executed: it nests tuples, which weights never do")
            was_tuple = is_put or code.name.startswith("TUPLE")
    except UnsafeFile:
        raise
    except ValueError as error:
        raise ValueError(f"is truncated or corrupt ({str(error).splitlines()[0][:100]})") from None
