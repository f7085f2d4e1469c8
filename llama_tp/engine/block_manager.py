"""Allocates the pages of the KV cache, and finds full pages that another prompt can share. Policy only: no tensors.

A full page is identified by its tokens and the page before it, so prompts with a common prefix find the same pages: a
trie of pages. An unreferenced page keeps its content until it is reallocated.

Attention reads contiguous pages in place and must gather scattered ones, so each sequence gets a reservation to grow
into: contiguous unreferenced pages, preferably those least recently used.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import chain, count

Tokens = Items[int]
_ROOT = 0
NO_RESERVATION = range(0)
_STEP = 4
"""Reservations begin at multiples of this many pages, so that sequences of similar length are equally spaced and one
attention call reads them all. Also the minimum size of a reservation."""
_MAX_CANDIDATES = 512
"""Reservations to compare: all, except in a large cache."""


class BlockManager:
    """Allocates and frees pages 0 .. num_pages - 1, counts references, finds shared prefixes.

    `most`: pages of the longest sequence.
    """

    def __init__(self, num_pages: int, page_size: int, most: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.most = most
        self._references = [0] * num_pages
        self._blank = dict.fromkeys(range(num_pages))  # ordered sets, by time of release
        self._kept: dict[int, None] = {}
        self._clock = count(1)
        self._last_use = [0] * num_pages  # when a kept page was released; 0: blank
        self._may_find_reservation = True  # False after a failed search, until pages are freed
        self._hand = 0  # where a search begins: rotates if there are too many candidates to see all
        self._busy = bytearray(num_pages)  # 1 for a referenced page, plus 1 for a reserved one
        self._node_ids = count(_ROOT + 1)
        self._nodes: dict[int, tuple[int, tuple[int, tuple[int, ...]]]] = {}  # page -> its node, and its key
        self._pages: dict[tuple[int, tuple[int, ...]], int] = {}  # (parent node, tokens) -> page
        self._children: dict[int, set[int]] = {}  # node -> pages with this parent

    @property
    def num_free(self) -> int:
        """Pages that can be allocated."""
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages that sequences refer to."""
        return self.num_pages - self.num_free

    def match(self, tokens: Tokens) -> list[int]:
        """The pages of the longest cached prefix of the tokens, excluding the last token, which must be computed to
        sample the next."""
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
        """Add references to pages that `match` found."""
        for page in pages:
            self._refer(page)
            self._kept.pop(page, None)

    def allocate(self, pages: list[int], reservation: range, likely: int) -> tuple[int | None, range]:
        """The next page for a sequence that has `pages`, and the remaining reservation after it; None if all pages are
        in use.

        `reservation`: the one returned by the sequence's last call. `likely`: how many more pages it may need.
        Other sequences get reserved pages only if no others are left. If one was taken, the sequence gets a new
        reservation.
        """
        if not reservation or self._references[reservation[0]]:
            self.cancel_reservation(reservation)
            reservation = self._reservation_after(pages[-1], likely) if pages else NO_RESERVATION
            if not reservation and self._may_find_reservation:
                reservation = self._find_reservation(likely)
                self._may_find_reservation = bool(reservation)
            for reserved in reservation:
                self._busy[reserved] += 1
        if reservation:
            page = reservation[0]
            self._busy[page] -= 1
        elif self.num_free == 0:
            return None, NO_RESERVATION
        else:
            page = self._single()
        self._forget(page)
        del self._blank[page]
        self._refer(page)
        return page, reservation[1:]

    def cancel_reservation(self, reservation: range) -> None:
        """Release a reservation that will not be used."""
        for page in reservation:
            self._busy[page] -= 1
            self._may_find_reservation |= not self._busy[page]

    def _reservation_after(self, page: int, num: int) -> range:
        """Blank pages directly after this one."""
        end = page + 1
        while end < min(page + 1 + num, self.num_pages) and not self._busy[end] and end in self._blank:
            end += 1
        return range(page + 1, end)

    def _single(self) -> int:
        """A free page: unreserved if possible; blank, else the least recently used."""
        free = chain(reversed(self._blank), self._kept)
        return next((page for page in free if not self._busy[page]), next(chain(reversed(self._blank), self._kept)))

    def _find_reservation(self, num: int) -> range:
        """Contiguous free pages, `num`, or half as many, and so on: blank if possible, else unused for longest."""
        step = min(_STEP, self.most)
        size = min(max(num, step), self.most)
        while True:
            candidates: list[tuple[int, int]] = []
            for at in chain(self._free(size, step, self._hand, self.num_pages), self._free(size, step, 0, self._hand)):
                age = max(self._last_use[at : at + size])
                candidates.append((age, -at if age else at))  # at equal age the last: ends of prefixes are less useful
                if age == 0 or len(candidates) == _MAX_CANDIDATES:
                    break
            if candidates:
                at = abs(min(candidates)[1])
                if len(candidates) == _MAX_CANDIDATES:
                    self._hand = at + size
                return range(at, at + min(num, size))
            if size == step:
                return NO_RESERVATION
            size = max(step, size // 2)

    def _free(self, size: int, step: int, start: int, end: int) -> Iterator[int]:
        """The multiples of step in [start, end) followed by `size` pages neither in use nor reserved."""
        free = bytes(size)
        at = self._busy.find(free, start)
        while at >= 0:
            at = -(-at // step) * step
            if at >= end:
                return
            if self._busy[at : at + size] == free:
                yield at
                at += step
            at = self._busy.find(free, at)

    def register(self, pages: list[int], index: int, tokens: Tokens) -> None:
        """Make page `index` of a sequence, full of these tokens, findable. Ignored if those before it are not."""
        page = pages[index]
        before = _ROOT if index == 0 else self._nodes.get(pages[index - 1], (None,))[0]
        if before is None or page in self._nodes:
            return
        key = (before, tuple(tokens))
        if key not in self._pages:  # else keep the page already registered with this content
            self._nodes[page] = (next(self._node_ids), key)
            self._pages[key] = page
            self._children.setdefault(before, set()).add(page)

    def release(self, pages: list[int]) -> None:
        """Drop one reference to each page. Unreferenced pages are free; registered ones keep their content."""
        now = next(self._clock)
        for page in reversed(pages):  # the end of a prefix is less useful than its beginning
            assert self._references[page] > 0, f"page {page} was freed twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._busy[page] -= 1
                self._may_find_reservation |= not self._busy[page]
                is_kept = page in self._nodes
                self._last_use[page] = now if is_kept else 0
                (self._kept if is_kept else self._blank)[page] = None

    def _refer(self, page: int) -> None:
        self._busy[page] += not self._references[page]
        self._references[page] += 1

    def _forget(self, page: int) -> None:
        """Unregister a page and all pages after it in the trie, which are unreferenced: all become blank."""
        stale = [page] if page in self._nodes else []
        while stale:
            one = stale.pop()
            node, key = self._nodes.pop(one)
            del self._pages[key]
            self._children.get(key[0], set()).discard(one)
            stale += self._children.pop(node, ())
            del self._kept[one]
            self._blank[one] = None
            self._last_use[one] = 0
