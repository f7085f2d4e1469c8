"""Text at the edges: tokenizers, chat formats and streaming detokenizers. Of llama_tp, imports only `file_kind`."""

from llama_tp.text.chat import ChatFormat, chat_format
from llama_tp.text.detokenizer import Detokenizer, TextStream
from llama_tp.text.dialog import ChatError, Message
from llama_tp.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ChatError",
    "ChatFormat",
    "Detokenizer",
    "Message",
    "TextStream",
    "Tokenizer",
    "chat_format",
    "load_tokenizer",
]
