"""Requests and their output, in any dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_tp.engine.request import FinishReason, Logprobs
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.errors import ApiError
from llama_tp.text.dialog import Json, Message
from llama_tp.text.grammar import Grammar
from llama_tp.text.tools.calls import ToolCallDelta, ToolChoice

Mode = Literal["text_completion", "chat"]

Prompt = str | tuple[int, ...]
"""Text, or token ids not yet checked against the vocabulary."""


@dataclass(frozen=True, slots=True)
class FieldNames:
    """What a dialect calls the fields that admission may refuse."""

    prompt: str = "prompt"
    dialog: str = "dialog"
    max_new_tokens: str = "max_new_tokens"
    min_new_tokens: str = "min_new_tokens"
    stop_token_ids: str = "stop_token_ids"
    logit_bias: str = "logit_bias"
    logprobs: str = "logprobs"
    top_logprobs: str = "top_logprobs"
    prompt_logprobs: str = "prompt_logprobs"
    allowed_token_ids: str = "allowed_token_ids"
    chat_template_kwargs: str = "chat_template_kwargs"
    n: str = "n"
    grammar: str = "response_format"
    tools: str = "tools"
    tool_choice: str = "tool_choice"
    messages: tuple[str, ...] = ()
    """Where each of the dialog's messages is in the body, unless it is dialog[index]."""


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """What the replies hold, in dialects that leave it to the client."""

    echo: bool = False
    """The prompt's text before the answer's, and its log probabilities if the answer has any."""
    prompt_logprobs: int | None = None
    """How many of the most probable tokens are listed for each of the prompt's; None: no log probabilities."""
    usage_in_stream: bool = False
    continuous_usage: bool = False
    """The usage so far in every event of a stream."""
    tokens_as_ids: bool = False
    """Tokens in log probabilities appear as "token_id:42"."""
    token_ids: bool = False
    """Ids of the prompt's and the answer's tokens."""
    echoed: Json = field(default_factory=dict)
    """Fields of the request that the answer repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request with every default filled in. Exactly one of prompts and dialog is set.

    Its fields are valid, individually and together. `Admission` checks what depends on the model and on the server's
    limits.
    """

    prompts: tuple[Prompt, ...] = ()
    """Each has its own answers."""
    dialog: tuple[Message, ...] | None = None
    """The chat format checks roles and their order."""
    continue_final_message: bool = False
    """Whether the answer continues the dialog's last message, which is the assistant's."""
    tools: tuple[Json, ...] = ()
    """The functions that the assistant may call, as in OpenAI's API: {"type": "function", "function": {...}}."""
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    grammar: Grammar | None = None
    """What the answer's text must match; not yet compiled."""
    add_generation_prompt: bool = True
    """Whether the dialog's prompt ends with the beginning of an answer."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template."""
    special_tokens: bool = True
    """Whether a prompt of text begins with BOS, if the vocabulary wants that."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many of the prompt's tokens, the last ones."""
    sampling: SamplingParams
    """stop_ids and bad_words are still empty; ids in logit_bias are not yet checked against the vocabulary."""
    max_new_tokens_explicit: bool = False
    """Whether the client set max_new_tokens: then it is kept or refused. A default is clipped to what fits."""
    stop: tuple[str, ...] = ()
    """Stop strings; the text layer finds them."""
    keep_stop: bool = False
    """Whether the text ends with the stop string, or the stop token's text, rather than before it."""
    special_text: bool = False
    """Whether the text has the pieces of special tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Additional ids that end the answer, not yet checked against the vocabulary."""
    bad_words: tuple[str, ...] = ()
    """Texts whose tokens must not be in the answer in a row."""
    ignore_eos: bool = False
    """Whether the model's own end tokens are ignored: only stop_token_ids end the answer."""
    timeout_s: float | None = None
    stream: bool = False
    reply: ReplyOptions = field(default_factory=ReplyOptions)
    names: FieldNames = field(default_factory=FieldNames)

    @property
    def num_outputs(self) -> int:
        """Answers to all prompts. Output i of prompt k has the index k * n + i."""
        return self.sampling.n * max(1, len(self.prompts))

    def prompt_name(self, index: int = 0) -> str:
        """The field that holds one of the prompts, or the dialog."""
        if self.dialog is not None:
            return self.names.dialog
        return self.names.prompt if len(self.prompts) == 1 else f"{self.names.prompt}[{index}]"

    @property
    def continues_text(self) -> bool:
        """Whether the answer continues the request's text rather than beginning a new one."""
        if self.dialog is None:
            return True
        return self.continue_final_message and bool(self.dialog[-1].content.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDefaults:
    """The configuration's defaults for fields that a request omits."""

    mode: Mode
    """The field to ask for when a request has neither a prompt nor a dialog."""
    max_new_tokens: int
    seed: int | None
    sampling: Mapping[str, float]
    """A value for each of the KNOBS of `SamplingParams`, by name."""
    configured: frozenset[str] = frozenset()
    """Which of max_new_tokens and the KNOBS are set by the configuration, or recommended by the model's publisher. The
    others have the native dialect's defaults, which may differ from another API's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDelta:
    """New content of one of a request's outputs."""

    index: int
    text: str
    """Without the text of tool calls."""
    ids: Sequence[int]
    logprobs: Sequence[Logprobs] | None
    """One per id. None: not requested."""
    finish_reason: FinishReason | None
    """None until the output ends."""
    error: ApiError | None
    """Why it failed, with finish_reason "error"."""
    tool_calls: Sequence[ToolCallDelta] = ()
    """New content of the output's tool calls, in order."""
    stop_string: str | None = None
    """The one of the request's stop strings that ended the output; in its last delta only."""
    prompt_logprobs: Sequence[Logprobs] | None = None
    """Those of its prompt's tokens from the second on, if requested, in the output's first delta."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request used."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Those of the prompt that were found in the prefix cache."""

    def fields(self) -> dict[str, int]:
        """As all dialects report it, with OpenAI's names."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
