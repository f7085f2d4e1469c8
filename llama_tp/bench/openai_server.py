"""A model behind an OpenAI-compatible base URL: of vLLM, llama.cpp's llama-server, llama-cpp-python, or our own server.

Servers differ in what they say of a model and in what prompts they take. Both are found out here, before the load:
`GET models` tells the name and mostly the context, and a first request tells whether prompts can be token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llama_tp.bench import client
from llama_tp.bench.api import GREEDY, Api, OpenAIAnswer
from llama_tp.bench.client import StatusError, Target
from llama_tp.bench.served import Served, get_json
from llama_tp.bench.workload import Job, warm_up

_MODELS = "/models"
_COMPLETIONS = "/completions"
_PROPS = "/props"
_REMEDY = "give --url as OpenAI's clients take base_url, such as http://127.0.0.1:8000/v1"
_NOT_TAKEN = (400, 422, 500)
"""What servers answer to a prompt of token ids if they take only text."""
_TEXT_MARGIN = 16
"""Tokens of the context that prompts of text leave free: BOS, and words of more than one token."""
_WORDS = (
    "the of and to in that is was for on with as it be at by this had not are but from or have an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about into "
    "than them can only other new some could time"
)
"""Common words. Each is one token, with the space before it, in the vocabulary of SmolLM2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What the user says of a model, where its server does not."""

    served_model: str | None = None
    """Its name."""
    max_seq_len: int | None = None
    vocab_size: int = 32000
    """Prompts are random ids below this."""
    eos_token_id: int | None = None
    """A token that the server is asked never to sample."""

    def __post_init__(self) -> None:
        for name, least in (("max_seq_len", 2 + _TEXT_MARGIN), ("vocab_size", 1), ("eos_token_id", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")


def served_by_openai(target: Target, hints: Hints) -> Served:
    """The model at a base URL. OSError or ValueError, with the remedy, if it cannot be driven."""
    model = _chosen(target, hints.served_model)
    name, num_ids = model["id"], _meta(model).get("n_vocab")
    if isinstance(num_ids, int) and hints.vocab_size > num_ids:
        raise ValueError(f"vocab_size={hints.vocab_size} must be at most {num_ids}, the vocabulary of {name}")
    max_seq_len = hints.max_seq_len or _context(target, model)
    api, is_text, counted_by = _probed(target, name, max_seq_len - _TEXT_MARGIN, hints)
    prompts = "common words" if is_text else "token ids"
    return Served(
        target=target,
        apis=[api],
        max_seq_len=max_seq_len - _TEXT_MARGIN if is_text else max_seq_len,
        description=f"{name}, context of {max_seq_len} tokens, prompts of {prompts}, answers counted by {counted_by}",
        facts={"model": name, "prompts": prompts, "counted_by": counted_by},
    )


def completions_api(model: str, *, is_text: bool = False, eos_token_id: int | None = None) -> Api:
    """The route `completions`, with every way to ask for an exact number of tokens.

    vLLM and llama.cpp follow `ignore_eos`, llama-cpp-python follows `min_tokens`; none minds the other field.
    """
    fixed: dict[str, Any] = {"model": model, "stream_options": {"include_usage": True}, **GREEDY}
    if eos_token_id is not None:
        fixed["logit_bias"] = {str(eos_token_id): -100}

    def fields(job: Job) -> dict[str, Any]:
        prompt = _text(job.prompt) if is_text else job.prompt
        return {**fixed, "prompt": prompt, "max_tokens": job.new, "min_tokens": job.new}

    return Api("openai", _COMPLETIONS, fields, OpenAIAnswer)


def _chosen(target: Target, wanted: str | None) -> dict[str, Any]:
    """The entry of the model in the server's list."""
    answer = get_json(target, _MODELS, remedy=_REMEDY)
    try:
        models = {str(model["id"]): model for model in answer["data"]}
    except (LookupError, TypeError):
        raise OSError(f"{target.url}{_MODELS} is not a list of OpenAI's API; {_REMEDY}") from None
    names = ", ".join(models) or "no model"
    if wanted is None and len(models) == 1:
        return dict(next(iter(models.values())))
    if wanted is None:
        raise ValueError(f"{target.url} serves {names}; choose one by --served_model")
    if wanted not in models:
        raise ValueError(f"served_model={wanted!r} must be one of those at {target.url}: {names}")
    return dict(models[wanted])


def _meta(model: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp says of the file of a model."""
    meta = model.get("meta")
    return meta if isinstance(meta, dict) else {}


def _context(target: Target, model: dict[str, Any]) -> int:
    """The longest sequence: vLLM's and our max_model_len, or the context of one of llama.cpp's slots."""
    stated = model.get("max_model_len") or _meta(model).get("n_ctx")
    if stated is None and model.get("owned_by") == "llamacpp":  # before it was in the list
        props = get_json(replace(target, path=target.path.removesuffix("/v1")), _PROPS, remedy=_REMEDY)
        stated = props.get("default_generation_settings", {}).get("n_ctx") if isinstance(props, dict) else None
    if type(stated) is not int or stated < 2 + _TEXT_MARGIN:
        raise OSError(f"{target.url}{_MODELS} does not say how long sequences can be; give --max_seq_len")
    return stated


def _probed(target: Target, name: str, max_seq_len: int, hints: Hints) -> tuple[Api, bool, str]:
    """How to ask this server, whether by text, and what its tokens are counted by. Ids are tried first."""
    jobs = warm_up(1, vocab_size=hints.vocab_size, max_seq_len=max_seq_len)
    refusals: list[StatusError] = []
    for is_text in (False, True):
        api = completions_api(name, is_text=is_text, eos_token_id=hints.eos_token_id)
        try:
            return api, is_text, _asked(jobs, target, api)
        except StatusError as refusal:
            refusals.append(refusal)
            if refusal.status not in _NOT_TAKEN:
                break
    raise refusals[0]


def _asked(jobs: list[Job], target: Target, api: Api) -> str:
    answer = OpenAIAnswer()
    client.drive(jobs, target, replace(api, answer=lambda: answer), concurrency=0)
    return answer.counted_by


def _text(ids: tuple[int, ...]) -> str:
    """A word for each id."""
    words = _WORDS.split()
    return " ".join(words[token % len(words)] for token in ids)
