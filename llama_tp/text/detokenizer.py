"""Token ids to text, one token at a time: O(1) per token, never half a character, never half a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llama_tp.text.tokenizer import Tokenizer

_MAX_UNFINISHED = 3
"""Most bytes of an incomplete UTF-8 character."""


class Detokenizer:
    """Pushes and the flush, joined, are what the ids add to the text of those that they come `after`.

    That is, the text before them and they are `tokenizer.decode` of all ids together. After nothing a text begins: the
    space that a vocabulary puts in front of a text is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        before = self._last_bytes(after)
        self._utf8.decode(before)  # the next bytes may complete a character that it leaves unfinished
        self._drops_space = tokenizer.drops_leading_space and not before

    def push(self, token_id: int) -> str:
        """Text that the token completes."""
        raw = self._token_bytes(token_id)
        if self._drops_space and raw:
            self._drops_space = False
            raw = raw.removeprefix(b" ")
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD. Call once, at the end."""
        return self._utf8.decode(b"", final=True)

    def _last_bytes(self, ids: Sequence[int]) -> bytes:
        """As many of the last bytes of a text as can be a part of a character."""
        raw = b""
        for token_id in reversed(ids):
            raw = self._token_bytes(token_id) + raw
            if len(raw) >= _MAX_UNFINISHED:
                break
        return raw[-_MAX_UNFINISHED:]


class TextStream:
    """A Detokenizer that ends at the first stop string to be complete; of several complete at once, the longest.

    Text that may be the beginning of a stop string is held back until that is decided. The text of the first min_tokens
    tokens is not searched: no stop string ends or begins in it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, min_tokens: int = 0, after: Sequence[int] = ()
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, after)
        self._matchers = [_Matcher(s) for s in stop]
        self._num_exempt = min_tokens
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: nothing is emitted any more."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Text that is now known to precede every stop string."""
        if self._stopped:
            return ""
        text = self._detokenizer.push(token_id)
        if self._num_exempt > 0:
            self._num_exempt -= 1
            return text
        return self._release(text)

    def flush(self) -> str:
        """The rest, held-back text included, when the generation ended without a stop string. Call once."""
        if self._stopped:
            return ""
        text = self._release(self._detokenizer.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        start = len(self._held)
        self._held += text
        for end in range(start + 1, len(self._held) + 1):
            complete = 0
            for matcher in self._matchers:
                if matcher.push(self._held[end - 1]):
                    complete = max(complete, len(matcher.stop))
            if complete:
                self._stopped = True
                return self._take(end - complete, rest="")
        undecided = max((matcher.matched for matcher in self._matchers), default=0)
        cut = len(self._held) - undecided
        return self._take(cut, rest=self._held[cut:])

    def _take(self, length: int, rest: str) -> str:
        taken, self._held = self._held[:length], rest
        return taken


class _Matcher:
    """Finds one string in a stream of characters (Knuth, Morris, Pratt 1977): amortized O(1) per character."""

    def __init__(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string is empty; leave it out")
        self.stop = stop
        self.matched = 0  # how much of the stop string the stream ends with
        self._fallback = [0] * len(stop)
        for i in range(1, len(stop)):
            self._fallback[i] = self._step(self._fallback[i - 1], stop[i])

    def push(self, char: str) -> bool:
        """Whether this character completes the stop string. Not to be called again once it did."""
        self.matched = self._step(self.matched, char)
        return self.matched == len(self.stop)

    def _step(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._fallback[matched - 1]
        return matched + (self.stop[matched] == char)
