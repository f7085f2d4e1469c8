"""Token ids to text, one token at a time: O(1) per token, never a partial character or a partial stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from llama_tp.text.tokenizer import Tokenizer

_MAX_UNFINISHED = 3
"""Maximum bytes of an incomplete UTF-8 character."""


class Detokenizer:
    """Incrementally decodes ids that follow the ids `after`.

    The text of `after` plus all pushed and flushed text equals `tokenizer.decode` of all ids. Without `after` a new
    text begins, so the leading space that a vocabulary adds is dropped. `specials`: special tokens appear as their
    pieces, which `decode` skips.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = (), *, specials: bool = False) -> None:
        self._token_bytes = bytes_with_specials(tokenizer) if specials else tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        before = self._last_bytes(after)
        self._utf8.decode(before)  # the next bytes may complete a character begun here
        self._drops_space = tokenizer.drops_leading_space and not before

    def push(self, token_id: int) -> str:
        """Text completed by this token."""
        raw = self._token_bytes(token_id)
        if self._drops_space and raw:
            self._drops_space = False
            raw = raw.removeprefix(b" ")
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """An unfinished character, as U+FFFD. Call once, at the end."""
        return self._utf8.decode(b"", final=True)

    def _last_bytes(self, ids: Sequence[int]) -> bytes:
        """The last bytes of a text, as many as an unfinished character may have."""
        raw = b""
        for token_id in reversed(ids):
            raw = self._token_bytes(token_id) + raw
            if len(raw) >= _MAX_UNFINISHED:
                break
        return raw[-_MAX_UNFINISHED:]


def bytes_with_specials(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Like `token_bytes`, but special tokens have their pieces."""
    pieces = {token_id: piece.encode() for piece, token_id in tokenizer.special_ids.items()}
    return lambda token_id: pieces.get(token_id) or tokenizer.token_bytes(token_id)


class TextStream:
    """A Detokenizer that ends at the first stop string completed, or the longest if several complete at once.

    Text that may be the beginning of a stop string is held back until that is decided. The text of the first
    min_tokens tokens is not searched, so stop strings neither begin nor end in it. `keep_stop`: the text ends with the
    stop string rather than before it. `specials`: as for the Detokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        after: Sequence[int] = (),
        keep_stop: bool = False,
        specials: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, after, specials=specials)
        self._keep_stop = keep_stop
        self._matchers = [_Matcher(s) for s in stop]
        self._num_exempt = min_tokens
        self._held = ""
        self.stop_string: str | None = None
        """The stop string that was found; if there is one, nothing more is emitted."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop_string is not None

    def push(self, token_id: int) -> str:
        """Text now known to precede any stop string."""
        if self.stopped:
            return ""
        text = self._detokenizer.push(token_id)
        if self._num_exempt > 0:
            self._num_exempt -= 1
            return text
        return self._release(text)

    def flush(self) -> str:
        """The rest, including held-back text, if generation ended without a stop string. Call once."""
        if self.stopped:
            return ""
        text = self._release(self._detokenizer.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        start = len(self._held)
        self._held += text
        for end in range(start + 1, len(self._held) + 1):
            complete = ""
            for matcher in self._matchers:
                if matcher.push(self._held[end - 1]):
                    complete = max(complete, matcher.stop, key=len)
            if complete:
                self.stop_string = complete
                return self._emit(end if self._keep_stop else end - len(complete), rest="")
        undecided = max((matcher.matched for matcher in self._matchers), default=0)
        cut = len(self._held) - undecided
        return self._emit(cut, rest=self._held[cut:])

    def _emit(self, length: int, rest: str) -> str:
        emitted, self._held = self._held[:length], rest
        return emitted


class _Matcher:
    """Finds one string in a stream of characters (Knuth, Morris, Pratt 1977): amortized O(1) per character."""

    def __init__(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string is empty; remove it")
        self.stop = stop
        self.matched = 0  # how much of the stop string the stream ends with
        self._fallback = [0] * len(stop)
        for i in range(1, len(stop)):
            self._fallback[i] = self._step(self._fallback[i - 1], stop[i])

    def push(self, char: str) -> bool:
        """Whether this character completes the stop string. Do not call again after True."""
        self.matched = self._step(self.matched, char)
        return self.matched == len(self.stop)

    def _step(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._fallback[matched - 1]
        return matched + (self.stop[matched] == char)
