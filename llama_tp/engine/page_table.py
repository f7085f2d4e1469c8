"""One rank's page table: the pages of each sequence. Only steps change it, so it is the same on every rank."""

from __future__ import annotations

from llama_tp.model.kv_cache import PageList


class PageTable:
    """One table row of page numbers for each sequence that holds cache."""

    def __init__(self, *, num_rows: int, page_size: int) -> None:
        self._page_size = page_size
        self._rows = [PageList(page_size) for _ in range(num_rows)]

    def __getitem__(self, row: int) -> PageList:
        return self._rows[row]

    def free(self, row: int) -> None:
        """Empty a table row."""
        self._rows[row] = PageList(self._page_size)

    @property
    def num_used(self) -> int:
        """Pages that the table refers to."""
        return len({page for row in self._rows for page in row.pages})
