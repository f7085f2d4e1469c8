"""model-config.yaml: what TorchServe's frontend reads, what our handler reads, and whether the two agree.

All of it is checked before any weight is read, and all problems are reported at once, one per line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from llama_tp.config import EngineConfig, parse_memory
from llama_tp.config_error import ConfigError
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import why_illegal
from llama_tp.serving.encoding import in_json_words, shown
from llama_tp.serving.fields import KNOB_TYPES, MaxNewTokens, Seed
from llama_tp.serving.generation import RequestDefaults

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveSeconds = Annotated[float, Field(gt=0)]
ServedName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[!-~]+$")]
"""Visible ASCII without spaces: clients and logs can carry it."""


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


_DEFAULTS = {knob.name: knob.default for knob in KNOBS} | {"temperature": 0.6, "top_p": 0.9}
"""For keys that the configuration omits. temperature and top_p are Meta's defaults."""
_KNOBS: dict[str, Any] = {name: (kind, _DEFAULTS[name]) for name, kind in KNOB_TYPES.items()}
_SamplingSection = create_model("_SamplingSection", __base__=_Section, **_KNOBS)


class HandlerSection(_SamplingSection):  # type: ignore[valid-type,misc]  # it is a class
    """`handler:` of model-config.yaml. Relative paths are relative to the model's folder in the model store.

    Also has a key for each of the KNOBS of `SamplingParams`, the default for requests that omit it.
    """

    converted_ckpt_dir: str
    """Folder written by `llama-tp convert`."""
    tokenizer_path: str
    """tokenizer.model (Llama 2 or 3), tokenizer.json, or a folder with one."""
    model_args_path: str | None = None
    """model_args.json; by default the one in converted_ckpt_dir."""
    served_model_name: ServedName | None = None
    """The model's name in answers of OpenAI's routes; requests may use it or the name in the URL. null: the latter."""
    api_key_file: str | None = None
    """A file with the key that requests must have. null: none is needed."""
    mode: Literal["text_completion", "chat"] = "text_completion"
    """What a request with neither prompt nor dialog is asked for."""
    chat_format: Literal["auto", "llama2", "llama3", "chatml", "jinja"] = "auto"
    """auto: the template that came with the tokenizer, else what the tokenizer's special tokens imply."""
    tool_format: Literal["auto", "hermes", "llama3_json", "pythonic"] = "auto"
    """How the model writes tool calls. auto: as its chat template says; a model without tools in its template is told
    of them in a system message."""
    max_seq_len: PositiveInt | None = None
    """Prompt plus generated tokens of one request; default: as in model_args.json."""
    max_batch_size: PositiveInt | None = None
    """Outputs generated concurrently; default: as in model_args.json."""
    max_batched_tokens: PositiveInt = 512
    """Tokens computed per step; longer prompts are prefilled in chunks of this size."""
    page_size: PositiveInt = 16
    """Tokens per page of KV cache."""
    kv_cache_memory: Any = None
    """Size of a rank's KV cache: bytes ("6GiB"), or, below 1, a share of the memory left after weights and steps. null:
    enough for max_batch_size outputs of max_seq_len."""
    max_waiting: PositiveInt = 1024
    """Outputs that may wait inside the engine, such as those of requests with n > 1; more are refused with 429."""
    prefix_cache: bool = True
    """Whether prompts with a common prefix, and the turns of a conversation, share pages."""
    speculative_tokens: NonNegativeInt = 0
    """Tokens per step that are predicted of an output from its own earlier tokens; 0: none. Changes no answer."""
    speculative_max_batch: PositiveInt = 2
    """No tokens are predicted while more outputs than this are generated concurrently."""
    deterministic: bool = False
    """Whether an answer is independent of what else is in the batch, in every dtype; slower."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: the checkpoint's, or float32 where the device has no fast bfloat16."""
    compile: Literal["auto", True, False] = "auto"
    """Whether kernels compiled on this machine compute. auto: on a CPU, as soon as they are compiled, if
    there is a compiler; true: loading waits for them, and fails without; false: never."""
    verify_checkpoint: Literal["always", "once", "size"] = "once"
    """Which files are compared with the manifest's sha256 while loading: all; those not compared before or changed
    since; none, only their sizes."""
    tp_shares: list[PositiveInt] | None = None
    """Query heads of each rank, for unequal devices. null: equal shares."""
    max_new_tokens: MaxNewTokens = 128
    """For requests that omit it. Clipped to what fits into max_seq_len."""
    manual_seed: Seed | None = None
    """Seed of requests that omit it; null: a random one for each."""
    collective_timeout_s: PositiveSeconds = 20.0
    """A rank that is silent for longer ends the group, which TorchServe then restarts."""
    heartbeat_s: PositiveSeconds = 2.0
    """Interval at which an idle leader signals to its followers that it is alive."""
    abandon_after_s: PositiveSeconds = 10.0
    """If nobody polls for results for this long, the last client is gone and its request is cancelled."""


class TorchrunSection(_Section):
    """`torchrun:` of model-config.yaml, as the frontend reads it."""

    nnodes: PositiveInt = 1
    nproc_per_node: Annotated[int, Field(ge=1, alias="nproc-per-node")]
    rdzv_backend: str = Field(default="c10d", alias="rdzv-backend")
    rdzv_endpoint: str = Field(default="", alias="rdzv-endpoint")
    OMP_NUMBER_THREADS: PositiveInt | None = None
    """CPU threads of each rank; by default its share of the available cores."""


class ModelConfig(_Section):
    """The whole model-config.yaml."""

    minWorkers: Literal[1] = 1
    """One worker is one group of ranks."""
    maxWorkers: Literal[1] = 1
    batchSize: PositiveInt = 1
    """Requests in flight. TorchServe's default of 1 would serve them one after another."""
    maxBatchDelay: PositiveInt = 100
    """Milliseconds that the first request waits for others to batch with: added to its time to first token."""
    responseTimeout: PositiveInt = 120
    """Seconds that one handle() call may take, not one request."""
    startupTimeout: PositiveInt = 120
    """Seconds that loading the model may take."""
    maxRetryTimeoutInSec: Annotated[int, Field(ge=0)] = 300
    jobQueueSize: PositiveInt = 100
    """Requests that may wait for one of the batchSize slots; more are refused with 503."""
    deviceType: Literal["cpu", "gpu"]
    deviceIds: list[int] | None = None
    parallelType: Literal["tp"]
    continuousBatching: Literal[True]
    torchrun: TorchrunSection
    handler: HandlerSection

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """Read a YAML file. ConfigError lists every problem."""
        return cls.of(read_yaml(path))

    @classmethod
    def of(cls, values: object) -> ModelConfig:
        """From parsed YAML, such as TorchServe's context.model_yaml_config. ConfigError lists every problem."""
        if not isinstance(values, Mapping):
            raise ConfigError(["model-config.yaml must be a mapping of keys to values"])
        problems = _refused(values)
        known = {key: value for key, value in values.items() if key not in _REFUSED}
        try:
            config = cls.model_validate(known)
        except ValidationError as error:
            raise ConfigError(problems + [_line(detail) for detail in error.errors(include_url=False)]) from None
        problems += config._disagreements()
        if problems:
            raise ConfigError(problems)
        return config

    def engine_config(self, args: ModelArgs) -> EngineConfig:
        """The engine's configuration for a model. ConfigError if the two do not fit."""
        handler = self.handler
        problems = []
        size = self.torchrun.nnodes * self.torchrun.nproc_per_node
        shares = None if handler.tp_shares is None else tuple(handler.tp_shares)
        if shares is not None and len(shares) != size:
            problems.append(
                f"handler.tp_shares={handler.tp_shares} has {len(shares)} shares, but torchrun starts {size} ranks; "
                "give each rank its query heads"
            )
        elif shares is not None and (reason := why_illegal(args, shares)):
            problems.append(f"handler.tp_shares={handler.tp_shares} {reason}")
        elif reason := why_illegal(args, size):
            problems.append(
                f"torchrun.nproc-per-node: tensor-parallel size {size} {reason}; this model runs at any size from 1 to "
                f"{args.n_heads}"
            )
        max_seq_len = handler.max_seq_len or args.max_seq_len
        if reason := args.why_too_long(max_seq_len):
            problems.append(f"handler.{reason}")
        max_batch_size = handler.max_batch_size or args.max_batch_size
        if self.batchSize > max_batch_size:
            problems.append(
                f"batchSize={self.batchSize} exceeds handler.max_batch_size={max_batch_size}: "
                "requests would wait inside the engine; lower one or raise the other"
            )
        if problems:
            raise ConfigError(problems)
        return EngineConfig(
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            max_batched_tokens=max(handler.max_batched_tokens, max_batch_size),
            page_size=handler.page_size,
            kv_cache_memory=handler.kv_cache_memory,
            max_waiting=handler.max_waiting,
            prefix_cache=handler.prefix_cache,
            speculative_tokens=handler.speculative_tokens,
            speculative_max_batch=handler.speculative_max_batch,
            deterministic=handler.deterministic,
            dtype=handler.dtype,
            compile=handler.compile,
            verify_checkpoint=handler.verify_checkpoint,
            device="cuda" if self.deviceType == "gpu" else "cpu",
            threads=self.torchrun.OMP_NUMBER_THREADS,
            tp_shares=shares,
            collective_timeout_s=handler.collective_timeout_s,
            heartbeat_s=handler.heartbeat_s,
        )

    def request_defaults(self, published: Mapping[str, float]) -> RequestDefaults:
        """What requests that omit a field get. `published`: the publisher's values, for what `handler` leaves open."""
        handler = self.handler
        own = {name: getattr(handler, name) for name in KNOB_TYPES if name in handler.model_fields_set}
        return RequestDefaults(
            mode=handler.mode,
            max_new_tokens=handler.max_new_tokens,
            seed=handler.manual_seed,
            sampling={name: getattr(handler, name) for name in KNOB_TYPES} | dict(published) | own,
            configured=frozenset({*own, *published} | {"max_new_tokens"} & handler.model_fields_set),
        )

    def _disagreements(self) -> list[str]:
        problems = []
        handler = self.handler
        if handler.kv_cache_memory is not None:
            try:
                parse_memory(handler.kv_cache_memory)
            except ValueError as error:
                problems.append(f"handler.kv_cache_memory={shown(handler.kv_cache_memory)} {error}")
        if self.responseTimeout <= handler.collective_timeout_s:
            problems.append(
                f"responseTimeout={self.responseTimeout} must be greater than handler.collective_timeout_s="
                f"{handler.collective_timeout_s:g}: the ranks must notice a lost peer before TorchServe gives up"
            )
        if handler.heartbeat_s >= handler.collective_timeout_s:
            problems.append(
                f"handler.heartbeat_s={handler.heartbeat_s:g} must be less than handler.collective_timeout_s="
                f"{handler.collective_timeout_s:g}"
            )
        if self.torchrun.nnodes == 1 and not self.torchrun.rdzv_endpoint:
            problems.append(
                'torchrun.rdzv-endpoint is missing: all models on this host would share one port; set "localhost:0"'
            )
        nnodes, endpoint = self.torchrun.nnodes, self.torchrun.rdzv_endpoint
        if nnodes > 1 and not _is_reachable(endpoint):
            problems.append(
                f"torchrun.rdzv-endpoint={shown(endpoint)}: torchrun.nnodes={nnodes} hosts rendezvous there; "
                'set HOST:PORT of the serving host, with a port other than 0, such as "first-host:29400"'
            )
        return problems


def read_yaml(path: str | Path) -> object:
    """The contents of a YAML file, unchecked. ConfigError if it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError([f"{path} does not exist"]) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{path} is not a YAML file: {' '.join(str(error).split())}"]) from None


def _is_reachable(endpoint: str) -> bool:
    """Whether it names a host and a port; port 0 is chosen by the host, and unknown to others."""
    host, _, port = endpoint.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


# Keys that TorchServe knows and that break this handler.
_REFUSED = {
    "asyncCommunication": "it serves rank 0 only, and the other ranks exit after 30 s",
    "useJobTicket": "it has no effect with continuous batching",
    "clientTimeoutInMills": "TorchServe drops the reply and leaves the client hanging",
    "sequenceBatching": "this handler uses continuousBatching",
    "parallelLevel": "the number of ranks is torchrun.nproc-per-node",
    "useVenv": "torchrun workers run in the Python that runs torchserve",
}


def _refused(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} must not be set: {_REFUSED[key]}; remove it" for key in values if key in _REFUSED]


def _line(detail: Any) -> str:
    """One pydantic error as one line that names key, value, constraint and remedy."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] == "extra_forbidden":
        *parents, name = (str(part) for part in detail["loc"])
        sections: dict[str, type[_Section]] = {"handler": HandlerSection, "torchrun": TorchrunSection}
        section = sections.get(".".join(parents), ModelConfig)
        names = [field.alias or name for name, field in section.model_fields.items()]
        close = difflib.get_close_matches(name, names, n=1)
        return f"{key} is not a known key; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}")
    message = detail["msg"]
    if "expected" in (context := detail.get("ctx", {})):
        message = message.replace(context["expected"], in_json_words(context["expected"]))
    return f"{key}={shown(detail['input'])}: {message[0].lower()}{message[1:]}"
