"""`llama-tp cache`: the checkpoints that `llama-tp serve` has converted, and the kernels compiled for this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_tp.checkpoint.conversions import Conversion
    from llama_tp.model.cpu.library_cache import Entry


def cache(remove: str | None = None) -> None:
    """List the checkpoints that `llama-tp serve SOURCE` has converted and the kernels that were compiled, or remove
    some.

    They are in converted/ and kernels/ of ~/.cache/llama_tp, or of $XDG_CACHE_HOME/llama_tp or $LLAMA_TP_CACHE if set.
    Downloads from the hub are beside them, in hub/.

    Args:
        remove: name of an entry to delete; stale, to delete conversions whose source has changed or is gone, and
            kernels of other versions of llama-tp; or all
    """
    from llama_tp.checkpoint import conversions
    from llama_tp.model.cpu.library_cache import LibraryCache, user_folder

    converted = conversions.conversions()
    libraries = LibraryCache(user_folder())
    kernels = libraries.entries()
    if remove is None:
        print("\n".join([*_converted_lines(converted), *_kernel_lines(kernels)]) or "the cache is empty")
        return
    chosen = [one for one in converted if _is_chosen(remove, one.folder.name, one.is_current)]
    chosen_kernels = [one for one in kernels if _is_chosen(remove, one.folder.name, one.is_current)]
    if not chosen and not chosen_kernels:
        if remove not in ("all", "stale"):
            raise ValueError(f"remove={remove!r} is not in the cache; `llama-tp cache` lists the names")
        print("nothing to remove")
    for entry in chosen:
        print(f"removing {entry.folder}")
        conversions.remove(entry)
    for library in chosen_kernels:
        print(f"removing {library.folder}")
        libraries.remove(library.folder.name)


def _is_chosen(remove: str, name: str, is_current: bool) -> bool:
    return remove in ("all", name) or (remove == "stale" and not is_current)


def _converted_lines(entries: list[Conversion]) -> Iterator[str]:
    for entry in entries:
        yield f"{entry.folder.name}  {entry.num_bytes / 1e9:.2f} GB  from {entry.source}{_state(entry.is_current)}"


def _kernel_lines(entries: list[Entry]) -> Iterator[str]:
    for entry in entries:
        yield (
            f"{entry.folder.name}  {entry.num_bytes / 1e6:.2f} MB  kernels compiled by {entry.compiler}"
            f"{_state(entry.is_current)}"
        )


def _state(is_current: bool) -> str:
    return "" if is_current else "  (stale)"
