"""`llama-tp cache`: the checkpoints that `llama-tp serve` has converted."""

from __future__ import annotations


def cache(remove: str | None = None) -> None:
    """List the checkpoints that `llama-tp serve SOURCE` has converted and kept, or remove some.

    They are in ~/.cache/llama_tp/converted, or in $XDG_CACHE_HOME/llama_tp or $LLAMA_TP_CACHE if set. Downloads from
    the hub are beside them, in hub/.

    Args:
        remove: name of an entry to delete; stale, to delete those whose source has changed or is gone; or all
    """
    from llama_tp.checkpoint import conversions

    entries = conversions.conversions()
    if remove is None:
        for entry in entries:
            state = "" if entry.is_current else "  (stale)"
            print(f"{entry.folder.name}  {entry.num_bytes / 1e9:.2f} GB  from {entry.source}{state}")
        if not entries:
            print("nothing has been converted")
        return
    chosen = [
        entry
        for entry in entries
        if remove in ("all", entry.folder.name) or (remove == "stale" and not entry.is_current)
    ]
    if not chosen and remove not in ("all", "stale"):
        raise ValueError(f"remove={remove!r} is not in the cache; `llama-tp cache` lists the names")
    if not chosen:
        print("nothing to remove")
    for entry in chosen:
        print(f"removing {entry.folder}")
        conversions.remove(entry)
