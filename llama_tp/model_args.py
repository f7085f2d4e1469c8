"""The architecture of a model, as Meta's params.json names it, and every check that needs more than one field.

Nothing here touches a device or a tensor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_tp.config_error import ConfigError
from llama_tp.file_kind import describe_model_folder, read_small, shown, why_no_content

ROPE_SCALINGS = ("llama3", "linear")
_LIMITS = ("max_seq_len", "max_batch_size")

_MAX_INT = 2**31 - 1
_MAX_FACTOR = 1e6
_MAX_OF = dict.fromkeys(("norm_eps", "rope_theta", "ffn_dim_multiplier"), 1e30)
_MAX_OF |= dict.fromkeys(("ffn_hidden_dim", "attention_head_dim", "context_limit"), float(_MAX_INT))
_MAX_LAYERS = 10_000
"""Names of all weights are made before any is read; published models have up to 126 layers."""

# params.json keys that say nothing about the weights of a text model.
_HARMLESS_PARAMS = frozenset(
    {"model_parallel_size", "vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers"}
)
_HUGGING_FACE_KEYS = frozenset({"architectures", "hidden_size", "model_type", "num_hidden_layers"})

# Meta's params.json says only `use_scaled_rope: true`; the factor is in Meta's code and in the models' config.json
# on the hub (https://github.com/meta-llama/llama-models, models/sku_list.py).
_META_ROPE_FACTORS = {
    # (dim, n_layers): factor
    (2048, 16): 32.0,  # Llama 3.2 1B
    (3072, 28): 32.0,  # Llama 3.2 3B
    (4096, 32): 8.0,  # Llama 3.1 8B
    (8192, 80): 8.0,  # Llama 3.1 and 3.3 70B
    (16384, 126): 8.0,  # Llama 3.1 405B
}


def meta_rope_factor(dim: int, n_layers: int) -> float | None:
    """By how much `use_scaled_rope` stretches the wavelengths of Meta's model of this shape; None for no known one."""
    return _META_ROPE_FACTORS.get((dim, n_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How the rotary wavelengths are stretched for a longer context.

    llama3: the long ones only (https://arxiv.org/abs/2407.21783, section 3.4). linear: all, as if positions were closer
    together (https://arxiv.org/abs/2306.15595); the fields after `factor` have no effect.
    """

    kind: str = "llama3"
    """llama3 | linear."""
    factor: float
    """How much longer the context became. Differs between models, so it has no default."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    """The context length of the original training."""

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in ROPE_SCALINGS:
            problems.append(f"rope_scaling.kind={_shown(self.kind)} must be one of {', '.join(ROPE_SCALINGS)}")
        problems += [
            f"rope_scaling.{name}={_shown(getattr(self, name))} must be a number above 0, at most {_MAX_FACTOR:g}"
            for name in ("factor", "low_freq_factor", "high_freq_factor")
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) <= _MAX_FACTOR
        ]
        if not _is_int(self.original_max_seq_len) or self.original_max_seq_len < 1:
            problems.append(
                f"rope_scaling.original_max_seq_len={_shown(self.original_max_seq_len)} must be a positive integer"
            )
        if not problems and self.low_freq_factor >= self.high_freq_factor:
            problems.append(
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must be less than "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs:
    """The architecture of a Llama model, in Meta's names (params.json), plus the two limits the converter records.

    Features that Meta's own models lack have names of ours, and are off by default.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    """Rows of the embedding. -1 (Llama 2's params.json): taken from the embedding, see `with_vocab_size`."""
    multiple_of: int = 256
    """The FFN hidden size is rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None = None
    ffn_hidden_dim: int | None = None
    """The FFN hidden size, if it does not follow Meta's rule (models not from Meta)."""
    attention_head_dim: int | None = None
    """The size of a head, if it is not dim / n_heads."""
    qkv_bias: bool = False
    """Whether wq, wk and wv add a bias."""
    wo_bias: bool = False
    ffn_bias: bool = False
    """Whether w1, w2 and w3 add a bias."""
    qk_norm: bool = False
    """Whether each head's query and key are RMS-normalised before rotation."""
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    """Whether the output projection is the embedding matrix."""
    quantization_group: int = 1
    """Columns that share a scale, which ranks do not divide. 1: no weight is quantized in groups."""
    context_limit: int | None = None
    """Upper limit of max_seq_len: the model's sliding window, or the context beyond which its rotary frequencies depend
    on the length. Neither is implemented."""
    max_seq_len: int = 2048
    """Default limit of prompt plus generated tokens of one sequence."""
    max_batch_size: int = 32
    """Default limit of sequences in flight."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "quantization_group", *_LIMITS):
            value, limit = getattr(self, name), _MAX_LAYERS if name == "n_layers" else _MAX_INT
            if not _is_int(value) or value < 1:
                problems.append(f"{name}={_shown(value)} must be a positive integer")
            elif value > limit:
                problems.append(f"{name}={_shown(value)} must be at most {limit}")
        if not _is_int(self.vocab_size) or not (1 <= self.vocab_size <= _MAX_INT or self.vocab_size == -1):
            problems.append(
                f"vocab_size={_shown(self.vocab_size)} must be a positive integer, or -1 to use the embedding's"
            )
        for name in _MAX_OF:
            value = getattr(self, name)
            if value is not None and not 0 < value <= _MAX_OF[name]:
                problems.append(f"{name}={_shown(value)} must be greater than 0, at most {_MAX_OF[name]:g}")
        if not problems:
            if self.attention_head_dim is None and self.dim % self.n_heads:
                problems.append(f"dim={self.dim} must be a multiple of n_heads={self.n_heads}")
            elif self.head_dim % 2:
                source = "dim / n_heads = " if self.attention_head_dim is None else "attention_head_dim="
                problems.append(f"{source}{self.head_dim} must be even: rotary embedding rotates pairs")
            if self.n_heads % self.n_kv_heads:
                problems.append(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
            if reason := self.why_too_long(self.max_seq_len):
                problems.append(reason)
        if problems:
            raise ConfigError(problems)

    def why_too_long(self, max_seq_len: int) -> str | None:
        """Why this model's sequences cannot be this long; None if they can."""
        if self.context_limit is None or max_seq_len <= self.context_limit:
            return None
        return (
            f"max_seq_len={max_seq_len} must be at most context_limit={self.context_limit}: beyond that, the model has "
            "a sliding window or changes its rotary frequencies, which is not supported; lower max_seq_len"
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads if self.attention_head_dim is None else self.attention_head_dim

    @property
    def hidden_dim(self) -> int:
        """FFN hidden size by Meta's rule: two thirds of 4*dim, times the multiplier, rounded up to multiple_of."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)

    def with_vocab_size(self, rows: int) -> ModelArgs:
        """The same model with its embedding's vocabulary size. ValueError if params.json says otherwise."""
        if self.vocab_size not in (-1, rows):
            raise ValueError(
                f"params.json says vocab_size={self.vocab_size} but the embedding has {rows} rows: "
                "these files are from different models"
            )
        return dataclasses.replace(self, vocab_size=rows)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write model_args.json."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ModelArgs:
        """Read model_args.json, or Meta's params.json. ConfigError says what is wrong with the file."""
        path = Path(path)
        try:
            data = read_small(path)
        except ValueError as error:
            raise ConfigError([str(error)]) from None
        except FileNotFoundError:
            raise ConfigError([f"{path} does not exist"]) from None
        except IsADirectoryError:
            raise ConfigError([f"{path} is a folder; give the model_args.json or params.json in it"]) from None
        except OSError as error:
            raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from None
        if problem := why_no_content(data):
            raise ConfigError([f"{path} {problem}"])
        try:
            params = json.loads(data)  # bytes, not text: they may begin with a byte-order mark
        except (ValueError, RecursionError) as error:
            raise ConfigError([f"{path} is not a JSON file: {error}"]) from None
        if not isinstance(params, dict):
            raise ConfigError([f"{path} must hold a JSON object, not {type(params).__name__}"])
        if len(_HUGGING_FACE_KEYS & params.keys()) > 1:
            remedy = "give Meta's params.json (often in the folder original/) or the model_args.json of a conversion"
            raise ConfigError([f"{path} is a Hugging Face config.json; {remedy}"])
        try:
            return cls.from_params(params)
        except ConfigError as error:
            raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None

    @classmethod
    def load_converted(cls, path: str | Path) -> ModelArgs:
        """Read the model_args.json of a converted checkpoint. ConfigError if it does not give the vocabulary size."""
        folder = Path(path).parent
        if not Path(path).exists() and (found := describe_model_folder(folder)):
            raise ConfigError([f"{path} does not exist: {folder} {found}"])
        args = cls.load(path)
        if args.vocab_size < 1:
            problem = f"vocab_size={args.vocab_size} does not give the vocabulary size"
            raise ConfigError([f"{path}: {problem}; use the model_args.json of a converted checkpoint"])
        return args

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> ModelArgs:
        """From the keys of model_args.json or params.json. Unknown keys are an error that names them."""
        values = {key: value for key, value in params.items() if key not in _HARMLESS_PARAMS}
        values = {key: value for key, value in values.items() if value is not None}
        scaling = values.pop("rope_scaling", None)
        scaled = values.pop("use_scaled_rope", scaling is not None)
        factors = {
            field: values.pop(key)
            for key, field in (
                ("rope_scaling_factor", "factor"),
                ("rope_low_freq_factor", "low_freq_factor"),
                ("rope_high_freq_factor", "high_freq_factor"),
            )
            if key in values
        }
        values.setdefault("vocab_size", -1)  # as in Meta's own code; Code Llama's params.json has none
        known = {field.name: field for field in dataclasses.fields(cls)}
        problems = []
        if unknown := [key for key in values if key not in known]:
            problems.append(f"unknown {_keys(unknown)}: this is not a text-only Llama 2 or 3 model")
        required = ("dim", "n_layers", "n_heads")
        problems += [f"key {key!r} is missing" for key in required if key not in values]
        if scaling is not None and not isinstance(scaling, Mapping):
            problems.append(f"rope_scaling={_shown(scaling)} must be an object")
        if not isinstance(scaled, bool):
            problems.append(f"use_scaled_rope={_shown(scaled)} must be true or false")
        for key, value in values.items():
            if key in known and not _has_type(value, known[key].type):
                problems.append(f"{key}={_shown(value)} must be {_KINDS[str(known[key].type).split(' | ')[0]]}")
        if problems:
            raise ConfigError(problems)
        values.setdefault("n_kv_heads", values["n_heads"])
        if scaled:
            known_factor = meta_rope_factor(values["dim"], values["n_layers"])
            defaults = {} if scaling or known_factor is None else {"factor": known_factor}
            values["rope_scaling"] = _rope_scaling({**defaults, **(scaling or {}), **factors})
        return cls(**values)


def _rope_scaling(values: Mapping[str, Any]) -> RopeScaling:
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    if unknown := sorted(set(values) - known):
        raise ConfigError([f"unknown {_keys(unknown)} in rope_scaling"])
    if "factor" not in values:
        problem = "use_scaled_rope needs a factor, and the sizes match no known model of Meta's"
        remedy = 'add "rope_scaling_factor": 8.0 for Llama 3.1 and 3.3, 32.0 for Llama 3.2'
        raise ConfigError([f"{problem}; {remedy}"])
    return RopeScaling(**values)


def _keys(names: list[str]) -> str:
    """Some keys, on one line."""
    listed = ", ".join(shown(repr(name)) for name in names[:4])
    return f"key{'s' if len(names) > 1 else ''} {listed}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false"}


def _shown(value: object) -> str:
    """A value in JSON's notation, short enough for one line."""
    try:
        return shown(json.dumps(value))
    except (TypeError, ValueError):
        return shown(repr(value))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _has_type(value: object, annotation: object) -> bool:
    """Whether a JSON value fits a field annotated int, float, bool, optionally None."""
    kind = str(annotation).split(" | ")[0]
    if kind == "int":
        return _is_int(value)
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, bool) if kind == "bool" else True
