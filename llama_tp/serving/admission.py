"""The one place that checks a request against the model and the server's limits, and tokenizes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import FieldNames, GenerationRequest
from llama_tp.text.chat import ChatFormat
from llama_tp.text.dialog import ChatError, Json, Message
from llama_tp.text.grammar import Grammar, GrammarError
from llama_tp.text.grammar_compiler import CompiledGrammar, GrammarCompiler
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.tools.base import ToolCallParser, name_of
from llama_tp.text.tools.choose import Tools, has_tools

NO_TOOLS = "its tool format is not known"
MAX_LOGPROBS = 2**15
"""Log probabilities in a non-streaming answer: at about 100 bytes each, half of what TorchServe can carry."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The engine's limits."""

    vocab_size: int
    max_seq_len: int
    """Prompt plus generated tokens of one output."""
    max_waiting: int
    """Outputs that may wait at once."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """One of a request's prompts in the engine's terms."""

    prompt: list[int]
    params: SamplingParams
    grammar: CompiledGrammar | None


class Admission:
    """Admits or refuses requests. `chat` is the model's chat format, or why it has none; `tools` likewise."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatFormat | str,
        limits: Limits,
        *,
        longest_token: int,
        tools: Tools | str = NO_TOOLS,
    ) -> None:
        """`longest_token`: bytes of the longest token."""
        self._tools = tools
        self.tokenizer = tokenizer
        self._chat = chat
        self._limits = limits
        self._longest_token = longest_token
        stop_ids = tokenizer.stop_ids if isinstance(chat, str) else tokenizer.stop_ids | chat.stop_ids
        self._grammars = GrammarCompiler(tokenizer, stop_ids, num_rows=limits.vocab_size)

    @property
    def max_seq_len(self) -> int:
        return self._limits.max_seq_len

    def admit(self, request: GenerationRequest) -> list[Admitted]:
        """The request's prompts. ApiError if one of them can never run here."""
        limits = self._limits
        check_vocabulary(request, limits.vocab_size)
        check_outputs(request, limits.max_waiting)
        prompts, stop_ids = self._encode(request)
        lengths = [len(prompt) for prompt in prompts]
        check_not_empty(request, lengths)
        check_scores(request, lengths)
        fitting = [fit_context(request, length, limits.max_seq_len, index) for index, length in enumerate(lengths)]
        most = fit_answer(request, max(fitting))
        end_ids = frozenset() if request.ignore_eos else stop_ids
        end_ids |= frozenset(request.stop_token_ids)
        bad_words = tuple(ids for word in request.bad_words for ids in self._tokens_of(word))
        params = request.sampling.but(stop_ids=end_ids, bad_words=bad_words)
        grammar = self._compile(request)
        return [
            Admitted(prompt, params.but(max_new_tokens=min(fits, most)), grammar)
            for prompt, fits in zip(prompts, fitting, strict=True)
        ]

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        """Ids of the only prompt, however long. ApiError if it certainly exceeds the context, or if the model cannot
        read it."""
        check_vocabulary(request, self._limits.vocab_size)
        if request.dialog is not None:
            return self._encode_dialog(request.dialog, request)[0]
        return self._encode_prompt(request, 0)

    def _encode(self, request: GenerationRequest) -> tuple[list[list[int]], frozenset[int]]:
        """Ids of each prompt, and the ids that end the answer."""
        if request.dialog is None:
            prompts = [self._encode_prompt(request, index) for index in range(len(request.prompts))]
            stop_ids = self.tokenizer.stop_ids
        else:
            ids, stop_ids = self._encode_dialog(request.dialog, request)
            prompts = [ids]
        if (most := request.truncate_prompt_tokens) is not None:
            prompts = [prompt[-most:] for prompt in prompts]
        return prompts, stop_ids

    def _encode_prompt(self, request: GenerationRequest, index: int) -> list[int]:
        prompt, tokenizer = request.prompts[index], self.tokenizer
        if isinstance(prompt, tuple):
            return list(prompt)
        if request.truncate_prompt_tokens is not None:  # what is certainly cut off need not be tokenized
            prompt = prompt[-self._limits.max_seq_len * self._longest_token :]
        else:
            self._check_length([prompt], request.prompt_name(index))
        return tokenizer.encode(prompt, bos=request.special_tokens and tokenizer.adds_bos)

    def _encode_dialog(self, dialog: Sequence[Message], request: GenerationRequest) -> tuple[list[int], frozenset[int]]:
        names = request.names
        self._check_length([*(message.content for message in dialog), *_texts_of_tools(request)], names.dialog)
        if isinstance(self._chat, str):
            raise ApiError(400, "chat_not_supported", f"this model cannot chat: {self._chat}", names.dialog)
        told, tools = self._tell(request, dialog)
        try:
            ids = self._chat.encode(
                told,
                continue_final_message=request.continue_final_message,
                add_generation_prompt=request.add_generation_prompt,
                tools=tools,
                variables=request.template_variables,
            )
            return ids, self._chat.stop_ids
        except ChatError as error:
            if error.index is not None:  # of a message of the request: tools may have added one before it
                error.index = max(0, error.index - len(told) + len(dialog))
            raise ApiError(400, error.code, str(error), _param_of(error, names)) from None

    def _tell(
        self, request: GenerationRequest, dialog: Sequence[Message]
    ) -> tuple[Sequence[Message], Sequence[Json] | None]:
        """The dialog and the tools as the chat format is to get them. Tools that may not be called are left out."""
        tools = _callable_tools(request)
        if not tools and not has_tools(dialog):
            return dialog, None
        if isinstance(self._tools, str):
            name = request.names.tools if tools else request.names.dialog
            raise ApiError(400, "tools_not_supported", f"this model cannot call tools: {self._tools}", name)
        return self._tools.dialog(dialog, tools)

    def tool_parser(self, request: GenerationRequest) -> ToolCallParser | None:
        """Finds the calls in an output of an admitted request, if it may have any."""
        tools = _callable_tools(request)
        if not tools:
            return None
        assert isinstance(self._tools, Tools), "the request was not admitted"
        return self._tools.format.parser([name_of(tool) for tool in tools])

    def _grammar(self, request: GenerationRequest) -> tuple[Grammar | None, str]:
        """Of the answer, tool calls included, and the field that prescribes it."""
        tools, choice = _callable_tools(request), request.tool_choice
        if isinstance(self._tools, str) or not tools or (choice.mode == "auto" and request.grammar is None):
            return request.grammar, request.names.grammar
        grammar = self._tools.format.grammar(tools, choice, request.grammar)
        return grammar, request.names.tools if choice.mode == "required" else request.names.grammar

    def _compile(self, request: GenerationRequest) -> CompiledGrammar | None:
        """The grammar of the answer."""
        grammar, name = self._grammar(request)
        if grammar is None:
            return None
        try:
            return self._grammars.compile(grammar, begins_text=not request.continues_text)
        except GrammarError as error:
            raise ApiError(400, "invalid_grammar", f"{name} cannot be followed: {error}", name) from None

    def _tokens_of(self, word: str) -> list[tuple[int, ...]]:
        """The token sequences to ban for a word, as in vLLM: its own, and that of the word after a space if only its
        first token differs."""
        bare, spaced = (tuple(self.tokenizer.encode(space + word.lstrip())) for space in ("", " "))
        is_other = bool(bare) and len(spaced) == len(bare) and spaced[0] != bare[0]
        return [bare, spaced] if is_other else [bare] if bare else []

    def _check_length(self, texts: list[str], name: str) -> None:
        """Refuse texts that cannot fit however they are tokenized, without tokenizing them: that would take seconds."""
        fewest = sum(map(len, texts)) // self._longest_token
        if fewest >= self._limits.max_seq_len:
            raise ApiError(
                400,
                "context_length_exceeded",
                f"{name} has at least {fewest} tokens, but the context holds {self._limits.max_seq_len} tokens, prompt "
                "and answer together",
                name,
            )


def _callable_tools(request: GenerationRequest) -> tuple[Json, ...]:
    return () if request.tool_choice.mode == "none" else request.tools


def _texts_of_tools(request: GenerationRequest) -> list[str]:
    """Texts as long as those that tools and calls become, or shorter."""
    calls = [call for message in request.dialog or () for call in message.tool_calls]
    return [str(one) for one in (*_callable_tools(request), *calls)]


def _param_of(error: ChatError, names: FieldNames) -> str:
    """Where in the body the error is."""
    if error.code in ("invalid_template_variable", "template_variables_not_supported"):
        return names.chat_template_kwargs
    if names.messages and error.index is not None:
        return names.messages[error.index]
    return error.param(names.dialog)


def fit_context(request: GenerationRequest, num_prompt_tokens: int, max_seq_len: int, index: int = 0) -> int:
    """The max_new_tokens to use for prompt number `index`. ApiError if prompt and generated tokens do not fit; a
    default is clipped instead, to no less than min_new_tokens."""
    prompt_name = request.prompt_name(index)
    remaining = max_seq_len - num_prompt_tokens
    least = min(1, request.sampling.max_new_tokens)
    if remaining < least:
        needed = "at least one generated token as well" if least else "it"
        message = (
            f"{prompt_name} has {num_prompt_tokens} tokens, but the context of {max_seq_len} tokens must hold "
            f"{needed}; send at most {max_seq_len - least}"
        )
        raise ApiError(400, "context_length_exceeded", message, prompt_name)
    wanted, name = request.sampling.min_new_tokens, request.names.min_new_tokens
    if request.max_new_tokens_explicit:
        wanted, name = request.sampling.max_new_tokens, request.names.max_new_tokens
    if wanted > remaining:
        message = (
            f"{name}={wanted} does not fit: {prompt_name} takes {num_prompt_tokens} of the context's "
            f"{max_seq_len} tokens; ask for at most {remaining}"
        )
        raise ApiError(400, "context_length_exceeded", message, name)
    return min(request.sampling.max_new_tokens, remaining)


def check_outputs(request: GenerationRequest, max_waiting: int) -> None:
    """ApiError if the request's outputs could never all wait at once."""
    if request.num_outputs <= max_waiting:
        return
    n, name = request.sampling.n, request.names.n
    message = f"{name}={n} must be at most {max_waiting}, the outputs that may wait (handler.max_waiting)"
    if len(request.prompts) > 1:
        name = request.names.prompt
        message = (
            f"{name} has {len(request.prompts)} prompts with {request.names.n}={n}, but at most {max_waiting} outputs "
            "may wait (handler.max_waiting); send fewer"
        )
    raise ApiError(400, "invalid_value", message, name)


def check_not_empty(request: GenerationRequest, lengths: Sequence[int]) -> None:
    """ApiError if one of the prompts, which have these lengths, has no tokens: vocabularies may lack control
    characters, and then encode a text of nothing else to nothing."""
    if 0 in lengths:
        name = request.prompt_name(lengths.index(0))
        message = f"{name} has no tokens: the model's vocabulary has none of its characters; send another text"
        raise ApiError(400, "empty_prompt", message, name)


def check_scores(request: GenerationRequest, lengths: Sequence[int]) -> None:
    """ApiError if the prompts, which have these lengths, have too many log probabilities for one answer. A stream sends
    them at once, too."""
    top, names = request.sampling.prompt_logprobs, request.names
    if top is None or (most := request.sampling.n * sum(lengths) * (1 + top)) <= MAX_LOGPROBS:
        return
    message = (
        f"{sum(lengths)} prompt tokens with {top} alternatives each, for {names.n}={request.sampling.n} outputs, are "
        f"{most} log probabilities, but one answer holds at most {MAX_LOGPROBS}; ask for fewer"
    )
    raise ApiError(400, "answer_too_large", message, names.prompt_logprobs)


def check_vocabulary(request: GenerationRequest, vocab_size: int) -> None:
    """ApiError for the first id in a request that is not in the vocabulary."""
    for index, prompt in enumerate(request.prompts):
        if isinstance(prompt, tuple):
            _check_token_ids(prompt, vocab_size, request.prompt_name(index))
    _check_token_ids(request.stop_token_ids, vocab_size, request.names.stop_token_ids)
    _check_token_ids(sorted(request.sampling.allowed_ids or ()), vocab_size, request.names.allowed_token_ids)
    for token, bias in request.sampling.logit_bias.items():
        if token >= vocab_size:
            name = f"{request.names.logit_bias}.{token}"
            message = f"{name}={bias}: {token} is not a token id; the vocabulary is 0 to {vocab_size - 1}"
            raise ApiError(400, "token_out_of_range", message, name)


def _check_token_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        at = next(index for index, token in enumerate(ids) if not 0 <= token < vocab_size)
        message = f"{name}[{at}]={ids[at]} is not a token id; the vocabulary is 0 to {vocab_size - 1}"
        raise ApiError(400, "token_out_of_range", message, f"{name}[{at}]")


def fit_answer(request: GenerationRequest, max_new_tokens: int) -> int:
    """The max_new_tokens to use. ApiError if a non-streaming answer could hold too many log probabilities; a default is
    clipped instead, to no less than min_new_tokens."""
    n, top, names = request.num_outputs, request.sampling.logprobs, request.names
    if request.stream or top is None:
        return max_new_tokens
    if not request.max_new_tokens_explicit:
        most = max(1, MAX_LOGPROBS // (n * (1 + top)))
        max_new_tokens = max(request.sampling.min_new_tokens, min(max_new_tokens, most))
    outputs = f"{names.n}={n} outputs" if len(request.prompts) < 2 else f"{n} outputs"
    if (most := n * max_new_tokens * (1 + top)) > MAX_LOGPROBS:
        message = (
            f"{outputs} of {names.max_new_tokens}={max_new_tokens} tokens with {names.top_logprobs}={top} "
            f"are up to {most} log probabilities, but one answer holds at most {MAX_LOGPROBS}; set stream, or ask for "
            "fewer"
        )
        raise ApiError(400, "answer_too_large", message, names.logprobs)
    return max_new_tokens
