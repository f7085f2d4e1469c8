"""What a route of another API takes from the server: the model's name and the defaults of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import Self

from llama_tp.engine.sampling_params import KNOBS, SamplingParams
from llama_tp.serving.encoding import shown
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.strict_json import parse_json
from llama_tp.serving.strict_model import StrictModel, validate

Fields = TypeVar("Fields", bound=StrictModel)
Names = tuple[str, ...]
"""What requests may call the model. Answers use the first name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """What a route of another API than our own needs to know of the server."""

    names: Names
    """The model's, of which the first one is used in answers."""
    max_tokens: int
    """Default."""
    seed: int | None
    sampling: Mapping[str, float]
    """Defaults of the KNOBS of `SamplingParams`."""

    @classmethod
    def of(cls, defaults: RequestDefaults, names: Names, *, max_tokens: int) -> Self:
        """As in vLLM, what the configuration sets is the default; otherwise it is what OpenAI and Anthropic have:
        plain sampling, and `max_tokens`."""
        sampling = {
            knob.name: defaults.sampling[knob.name] if knob.name in defaults.configured else knob.default
            for knob in KNOBS
        }
        if "max_new_tokens" in defaults.configured:
            max_tokens = defaults.max_new_tokens
        return cls(names=names, max_tokens=max_tokens, seed=defaults.seed, sampling=sampling)

    @property
    def model_name(self) -> str:
        return self.names[0]

    def sampling_params(self, given: Mapping[str, Any], *, max_new_tokens: int, logprobs: int | None) -> SamplingParams:
        """Of a request for one output. `given`: the fields that it sets, by name."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            **{name: given.get(name, default) for name, default in self.sampling.items()},
            seed=given.get("seed", self.seed),
            logprobs=logprobs,
        )

    def validate(self, model: type[Fields], body: object) -> Fields:
        """The fields of a body. ApiError with status 404 if it is for another model, else 400 if it is invalid."""
        payload = parse_json(body)
        fields = validate(model, payload)
        name = payload.get("model")
        if name is not None and name not in self.names:
            message = f"model={shown(name)} does not exist; this server has {shown(self.model_name)}"
            raise ApiError(404, "model_not_found", message, "model")
        return fields
