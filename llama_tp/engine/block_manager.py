"""Which pages of the KV cache are whose. Policy only: no tensor in sight."""

from __future__ import annotations


class BlockManager:
    """Hands out pages 0 .. num_pages - 1, counts references, takes pages back."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = dict.fromkeys(range(num_pages))  # an ordered set: whatever was freed first is reused first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, preferred: int) -> int | None:
        """A free page, the preferred one if it is free; None if all are taken.

        A sequence whose pages are neighbours is read from the cache as one slice, without a gather.
        """
        page = preferred if preferred in self._free else next(iter(self._free), None)
        if page is not None:
            del self._free[page]
            self._references[page] = 1
        return page

    def release(self, pages: list[int]) -> None:
        """Drop one reference to each page; pages nobody refers to are free again."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} was freed twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None
