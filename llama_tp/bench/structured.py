"""What `bench engine --against structured` holds answers to: a JSON array of records that does not end in a run."""

from __future__ import annotations

from llama_tp.text import load_tokenizer
from llama_tp.text.grammar import Grammar
from llama_tp.text.grammar_compiler import CompiledGrammar, GrammarCompiler

_RECORD = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 9999},
        "name": {"type": "string", "maxLength": 24},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
        "state": {"enum": ["new", "open", "done"]},
    },
    "required": ["id", "name", "code", "state"],
    "additionalProperties": False,
}
"""Bounded, so that a model cannot stay in one string, where every token is allowed."""
_MIN_RECORDS = 10_000
"""More than fit into any context."""


def endless_records(checkpoint: str, vocab_size: int) -> CompiledGrammar:
    """The grammar for a checkpoint with a tokenizer. FileNotFoundError if it has none."""
    tokenizer = load_tokenizer(checkpoint)
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids, num_rows=vocab_size)
    try:
        schema = {"type": "array", "items": _RECORD, "minItems": _MIN_RECORDS}
        return compiler.compile(Grammar.json_schema(schema))
    finally:
        compiler.close()
