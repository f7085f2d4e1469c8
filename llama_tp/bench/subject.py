"""The model that a benchmark measures, a checkpoint or random weights, and how the engine runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_tp.config import EngineConfig
from llama_tp.model.published import PUBLISHED, published
from llama_tp.model.weights import WeightFormats, quantized_args, quantized_formats
from llama_tp.model_args import ModelArgs

if TYPE_CHECKING:
    from llama_tp.engine.engine import Engine
    from llama_tp.parallel.launch import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The settings of an engine that every benchmark offers; those that remain follow from the work."""

    dtype: str = "auto"
    compile: bool | str = "auto"
    device: str = "auto"
    threads: int | None = None
    speculative_tokens: int = 0
    speculative_max_batch: int = 2

    def config(self, **limits: Any) -> EngineConfig:
        """The only place where benchmarks make an engine's configuration. `limits`: its other fields."""
        return EngineConfig(**asdict(self), **limits)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model."""

    name: str
    args: ModelArgs
    checkpoint: str | None
    """The folder of a converted checkpoint; None: random weights."""
    formats: WeightFormats = field(default_factory=dict)
    """Of random weights."""

    def load(self, config: EngineConfig, group: Group) -> Engine:
        """This rank's engine, when its kernels are compiled, unless they cannot be. ValueError, on every rank, as from
        `load_engine`."""
        from llama_tp.engine.startup import RandomSource, load_engine, make_engine

        if self.checkpoint is not None:
            return load_engine(self.checkpoint, self.args, config, group, wait_for_kernels=True)
        return make_engine(lambda: RandomSource(self.formats), self.args, config, group, wait_for_kernels=True)


def kernels_of(engine: Engine) -> str:
    """What computes an engine's decode steps."""
    from llama_tp.parallel.compiled import CompiledTransformer

    return "compiled kernels" if isinstance(engine.runner.model, CompiledTransformer) else "eager"


def join_group(config: EngineConfig) -> Group:
    """Join the group of ranks, with the threads that the engine will have, so that its device can be measured first."""
    import torch

    from llama_tp.parallel.launch import join
    from llama_tp.threads import choose_num_threads

    group = join(config.device, timeout_s=config.collective_timeout_s)
    if group.device.type == "cpu":
        torch.set_num_threads(choose_num_threads(config.threads))
    return group


def choose_subject(
    checkpoint: str | None, *, random_weights: bool = False, model: str | None = None, quantization: str | None = None
) -> Subject:
    """The model that a command line asks for. ValueError, with the remedy, if it asks for none, or for two.

    quantization: int8 or int4. A checkpoint must have been converted to it.
    """
    if not isinstance(random_weights, bool):
        raise ValueError(f"random_weights={random_weights!r} must have no value; name the model by --model")
    if random_weights:
        if checkpoint is not None:
            raise ValueError(f"random_weights, but also the checkpoint {checkpoint}; leave one of them out")
        if model is None:
            raise ValueError("random_weights needs --model: llama2-7b, another published name, or a params.json")
        return _random(model, quantization)
    if model is not None:
        raise ValueError(f"model={model!r} is for random weights; add --random-weights, or leave it out")
    if checkpoint is None:
        raise ValueError("give a converted checkpoint, or --random-weights --model NAME")
    args = ModelArgs.load_converted(Path(checkpoint, "model_args.json"))
    if quantization is not None:
        _check_quantization(checkpoint, quantization)
    return Subject(checkpoint, args, checkpoint)


def architecture(model: str) -> ModelArgs:
    """Of a published name, or in a JSON file of any kind. ValueError if it is neither."""
    if model in PUBLISHED:
        return PUBLISHED[model]
    if not Path(model).exists():
        try:
            return published(model)
        except ValueError as error:
            raise ValueError(f"{error}; nor is there a file of this name") from None
    from llama_tp.checkpoint.formats.architecture import read_architecture

    return read_architecture(model)


def _random(model: str, quantization: str | None) -> Subject:
    args = architecture(model)
    if quantization is None:
        return Subject(f"{model}, random weights", args, None)
    formats = quantized_formats(args, quantization)
    return Subject(f"{model}, random weights in {quantization}", quantized_args(args), None, formats)


def _check_quantization(checkpoint: str, quantization: str) -> None:
    from llama_tp.checkpoint.store.reading import StoredFiles

    found = sorted({one.name for one in StoredFiles(checkpoint).formats.values()})
    if quantization not in found:
        raise ValueError(
            f"quantization={quantization!r}, but the layers of {checkpoint} are {', '.join(found) or 'dense'}; convert "
            f"the original weights with `llama-tp convert --quantize {quantization}`"
        )
