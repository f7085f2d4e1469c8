"""Our wording for torch's refusal to load a file: never "set weights_only to False"."""

from __future__ import annotations

import pickle
import re


def why_not_loaded(error: Exception) -> str:
    """One line for the exception of a `torch.load(weights_only=True)`, to follow the file name."""
    # Other errors, such as that for a TorchScript archive, also give that advice.
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            return f"is refused, nothing in it was executed: it needs {wanted[1]}, which weights never need"
        return "is corrupt or unsafe, nothing in it was executed: it contains more than tensors"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return f"is truncated or corrupt ({reason})"
