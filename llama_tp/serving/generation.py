"""What a client asks for and what it gets, whatever dialect it speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama_tp.engine.request import FinishReason, Logprobs
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.errors import ApiError
from llama_tp.text.dialog import Message

Mode = Literal["text_completion", "chat"]


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
    n: str = "n"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request with every default filled in. Exactly one of prompt and dialog is set.

    Its fields are valid on their own and with each other. `Admission` checks what depends on the model and on the
    server's limits.
    """

    prompt: str | tuple[int, ...] | None = None
    """Text, or token ids of which the upper bound is still unchecked."""
    dialog: tuple[Message, ...] | None = None
    """Roles and their order are the chat format's to check."""
    continue_final_message: bool = False
    """The answer continues the dialog's last message, which is the assistant's."""
    sampling: SamplingParams
    """stop_ids is still empty, and the upper bound of the ids in logit_bias unchecked."""
    max_new_tokens_explicit: bool = False
    """The client itself asked for max_new_tokens: it is kept or refused. A default is clipped to what fits."""
    stop: tuple[str, ...] = ()
    """Stop strings; the text layer looks for them."""
    stop_token_ids: tuple[int, ...] = ()
    """End the answer, too. Their upper bound is still unchecked."""
    ignore_eos: bool = False
    """Only stop_token_ids end the answer, the model's own end tokens do not."""
    timeout_s: float | None = None
    stream: bool = False
    names: FieldNames = field(default_factory=FieldNames)

    @property
    def prompt_name(self) -> str:
        """The field that holds the prompt."""
        return self.names.prompt if self.dialog is None else self.names.dialog

    @property
    def continues_text(self) -> bool:
        """Whether the answer goes on with text of the request, rather than begin one."""
        if self.dialog is None:
            return True
        return self.continue_final_message and bool(self.dialog[-1].content.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDefaults:
    """What the configuration says for requests that leave it open."""

    mode: Mode
    """The field to ask for when a request has neither a prompt nor a dialog."""
    max_new_tokens: int
    seed: int | None
    sampling: Mapping[str, float]
    """By name of the parameter of `SamplingParams`: a value for each of its KNOBS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDelta:
    """What is new in one of a request's outputs."""

    index: int
    text: str
    ids: Sequence[int]
    logprobs: Sequence[Logprobs] | None
    """One for each id. None: not asked for."""
    finish_reason: FinishReason | None
    """None while the output goes on."""
    error: ApiError | None
    """Why it failed, with finish_reason "error"."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request has cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
