"""Compiles grammars for a vocabulary: which tokens may come next in a text."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from threading import Lock

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from llama_tp.text.grammar import Grammar, GrammarError
from llama_tp.text.grammar_checker import PROCESS_LIMITS
from llama_tp.text.grammar_source import LIMITS, source_of
from llama_tp.text.limited_process import LimitedProcess, ProcessFailure
from llama_tp.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_SOURCE = 256 * 1024
"""Characters of a grammar."""
_NEVER_MERGED = "\n"
"""Sentencepiece's pieces hold no newline, which is a byte of its own."""
_NUM_CACHED = 64
"""Grammars kept, compiled or found to be invalid."""


class GrammarState:
    """How far one text has come in its grammar. Not thread-safe."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def has_failed(self) -> bool:
        """Whether the grammar turned out to be too complex; there is no next token then."""
        return self._matcher.is_error()

    def accept(self, token_id: int) -> None:
        """The text's next token, which must be one that the last mask allows."""
        self._matcher.consume_token(token_id)

    def fill_mask(self, address: int, num_bytes: int) -> None:
        """Write the mask of the tokens that may come next into memory: bit i % 8 of byte i // 8 is token i.

        Releases the GIL. num_bytes: a multiple of 4, for at least the rows of the embedding.
        """
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)


class CompiledGrammar:
    """A grammar for one vocabulary. A text that has reached its end may only go on with a stop id."""

    def __init__(self, matcher: LLMatcher, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._matcher = matcher

    def start(self) -> GrammarState:
        """The state at the beginning of a text."""
        return GrammarState(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars and remembers them. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int], *, num_rows: int) -> None:
        """num_rows: of the embedding. Rows beyond the vocabulary are never allowed."""
        self._tokenizer = tokenizer
        self._stop_ids = sorted(stop_ids)
        self._num_rows = num_rows
        self._checker = LimitedProcess("llama_tp.text.grammar_checker", PROCESS_LIMITS, "checking a grammar")
        self._compiled: OrderedDict[tuple[Grammar, bool], CompiledGrammar | GrammarError] = OrderedDict()
        self._lock = Lock()

    def compile(self, grammar: Grammar, *, begins_text: bool = True) -> CompiledGrammar:
        """The compiled grammar of an answer. GrammarError if that is impossible, or takes too long.

        begins_text: whether the answer is a text of its own, which may begin with the space that the vocabulary drops.
        """
        key = (grammar, begins_text and self._tokenizer.drops_leading_space)
        with self._lock:
            result = self._compiled.pop(key, None) or self._try(*key)
            self._compiled[key] = result
            if len(self._compiled) > _NUM_CACHED:
                self._compiled.popitem(last=False)
        if isinstance(result, GrammarError):
            raise GrammarError(str(result))
        return result

    def close(self) -> None:
        """End the process that checks grammars; another one starts if there is another grammar."""
        with self._lock:
            self._checker.close()

    def _try(self, grammar: Grammar, leading_space: bool) -> CompiledGrammar | GrammarError:
        try:
            if len(grammar.source) > MAX_SOURCE:
                raise GrammarError(f"it has {len(grammar.source)} characters, but may have at most {MAX_SOURCE}")
            source = source_of(grammar, leading_space=leading_space)
            self._check(source)
            matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise GrammarError(_first_line(matcher.get_error()))
            return CompiledGrammar(matcher, self._num_rows)
        except GrammarError as error:
            return error

    def _check(self, source: str) -> None:
        self._checker.start()
        try:
            answer = self._checker.ask({"grammar": source})
        except ProcessFailure as error:
            raise GrammarError(f"it is too complex: {error}") from None
        if "invalid" in answer:
            raise GrammarError(_first_line(answer["invalid"]))

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._tokenizer, self._num_rows)),
            n_vocab=self._num_rows,
            eos_token=self._stop_ids,
        )


class _Vocabulary:
    """A Tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, num_rows: int) -> None:
        pieces = {token_id: piece for piece, token_id in tokenizer.special_ids.items()}
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(pieces)
        self.tokens = [
            pieces[token_id].encode() if token_id in pieces else tokenizer.token_bytes(token_id)
            for token_id in range(num_rows)
        ]
        self._encode = tokenizer.encode
        self._has_prefix = tokenizer.drops_leading_space

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text inside another one. Asked for what a grammar prescribes: these tokens are the only ones that
        its mask allows."""
        inside = text if isinstance(text, str) else text.decode("utf-8", "replace")
        if not self._has_prefix:
            return self._encode(inside)
        before = self._encode(_NEVER_MERGED)  # after the space that the vocabulary adds
        ids = self._encode(_NEVER_MERGED + inside)
        assert ids[: len(before)] == before, f"{_NEVER_MERGED!r} was merged with {inside!r}"
        return ids[len(before) :]


def _first_line(problem: str) -> str:
    """A message of llguidance without what it adds for its developers, on one line."""
    lines = [line.strip() for line in problem.splitlines()]
    return re.sub(r"\s+", " ", " ".join(line for line in lines if line and not line.startswith("<")))[:300]
