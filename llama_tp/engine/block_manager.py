"""Which pages of the KV cache are whose, and which full pages can serve another prompt. Policy only: no tensor.

A full page is known by its tokens and by the page before it, so that two prompts which begin alike find the same pages:
a trie whose nodes are pages. A page that nobody refers to any more keeps its content until its place is needed; of
those, the one that was released first goes first.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import count

Tokens = Items[int]
_ROOT = 0


class BlockManager:
    """Hands out pages 0 .. num_pages - 1, counts references, finds shared prefixes, takes pages back."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        self._blank = dict.fromkeys(range(num_pages))  # ordered sets; what was freed first is reused first
        self._kept: dict[int, None] = {}
        self._node_ids = count(_ROOT + 1)
        self._nodes: dict[int, tuple[int, tuple[int, tuple[int, ...]]]] = {}  # page -> its node, and its key
        self._pages: dict[tuple[int, tuple[int, ...]], int] = {}  # (node before, tokens) -> page

    @property
    def num_free(self) -> int:
        """Pages that can be allocated."""
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages that sequences refer to."""
        return self.num_pages - self.num_free

    def match(self, tokens: Tokens) -> list[int]:
        """The pages that hold the longest known prefix of the tokens, without the last one: that must be computed, to
        sample what follows."""
        pages = []
        node = _ROOT
        for start in range(0, (len(tokens) - 1) // self.page_size * self.page_size, self.page_size):
            page = self._pages.get((node, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            pages.append(page)
            node = self._nodes[page][0]
        return pages

    def num_free_after(self, shared: list[int]) -> int:
        """Pages that could still be allocated if these were shared."""
        return self.num_free - sum(self._references[page] == 0 for page in shared)

    def share(self, pages: list[int]) -> None:
        """Refer to pages that `match` found."""
        for page in pages:
            self._references[page] += 1
            self._kept.pop(page, None)

    def allocate(self, preferred: int) -> int | None:
        """A page to write to, the preferred one if it is blank; None if all are in use.

        A sequence whose pages are neighbours is read from the cache as one slice, without a gather.
        """
        page = preferred if preferred in self._blank else next(iter(self._blank or self._kept), None)
        if page is None:
            return None
        self._forget(page)
        self._blank.pop(page, None)
        self._kept.pop(page, None)
        self._references[page] = 1
        return page

    def register(self, pages: list[int], index: int, tokens: Tokens) -> None:
        """Page `index` of a sequence is full of these tokens from now on, and those before it are registered."""
        page = pages[index]
        before = _ROOT if index == 0 else self._nodes.get(pages[index - 1], (None,))[0]
        if before is None or page in self._nodes:
            return
        key = (before, tuple(tokens))
        if key not in self._pages:  # else a page with this content was registered in the meantime: keep that one
            self._nodes[page] = (next(self._node_ids), key)
            self._pages[key] = page

    def release(self, pages: list[int]) -> None:
        """Drop one reference to each page; what nobody refers to is free, and kept if it can serve others."""
        for page in reversed(pages):  # the end of a prefix is of less use than its beginning
            assert self._references[page] > 0, f"page {page} was freed twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                (self._kept if page in self._nodes else self._blank)[page] = None

    def _forget(self, page: int) -> None:
        """Nobody will find this page any more, nor the pages after it."""
        if page in self._nodes:
            _, key = self._nodes.pop(page)
            del self._pages[key]
