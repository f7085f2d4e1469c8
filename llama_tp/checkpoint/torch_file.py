"""What torch says when it refuses to load a file, in the words of this project: never "set weights_only to False"."""

from __future__ import annotations

import pickle
import re


def is_about_the_file(error: Exception) -> bool:
    """Whether torch blames what it read, and not the memory or a device."""
    return isinstance(error, pickle.UnpicklingError) or any(
        word in str(error) for word in ("PytorchStreamReader", "weights_only")
    )


def why_not_loaded(error: Exception) -> str:
    """One line for the exception of a `torch.load(weights_only=True)`, to stand behind the name of the file."""
    # Other errors give that advice, too, such as the one for a TorchScript archive.
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            return f"is refused, nothing in it was executed: it wants {wanted[1]}, which no weights need"
        return "is corrupt or unsafe, nothing in it was executed: it holds other things than tensors"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return f"is truncated or corrupt ({reason})"
