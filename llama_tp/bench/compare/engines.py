"""What runs inside a contender's process: each engine behind one interface. Peers are imported only there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from llama_tp.bench.contenders import Contender, longest_sequence

MAX_BATCHED_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a contender is loaded for."""

    form: str
    threads: int
    batch: int
    """Most sequences."""
    prompt: int
    """Most tokens of a prompt."""
    new: int
    path: str | None = None
    model: str | None = None
    """Random weights of this architecture, instead of a path."""


def load(engine: str, work: Work) -> tuple[Contender, str]:
    """The contender, and its version. Any error of the peer's is passed on."""
    return _LOADERS[engine](work)


def _ours(work: Work) -> tuple[Contender, str]:
    from llama_tp import __version__
    from llama_tp.bench.contenders import OurEngine
    from llama_tp.bench.subject import EngineOptions, choose_subject, kernels_of
    from llama_tp.parallel.launch import join

    form = work.form if work.form in ("int8", "int4") else None
    is_random = work.model is not None
    subject = choose_subject(
        work.path, random_weights=is_random, model=work.model, quantization=form if is_random else None
    )
    dtype = "float32" if work.form == "float32" else "bfloat16"
    config = EngineOptions(dtype=dtype, device="cpu", threads=work.threads).config(
        max_seq_len=longest_sequence(work.batch, work.prompt, work.new, MAX_BATCHED_TOKENS),
        max_batch_size=work.batch,
        max_batched_tokens=max(MAX_BATCHED_TOKENS, work.batch),
    )
    engine = subject.load(config, join("cpu"))
    return OurEngine(engine), f"{__version__}, {kernels_of(engine)}"


def _transformers(work: Work) -> tuple[Contender, str]:
    import torch

    from llama_tp.bench.contenders import Transformers
    from llama_tp.bench.peers import dense_weights, transformers_model
    from llama_tp.bench.subject import choose_subject

    torch.set_num_threads(work.threads)
    subject = choose_subject(work.path, random_weights=work.model is not None, model=work.model)
    dtype = torch.float32 if work.form == "float32" else torch.bfloat16
    weights = dense_weights(subject.args, subject.checkpoint)
    return Transformers(transformers_model(subject.args, weights, dtype)), version("transformers")


def _llama_cpp(work: Work) -> tuple[Contender, str]:
    from llama_tp.bench.compare.llama_cpp_peer import LlamaCpp

    return LlamaCpp(work), version("llama-cpp-python")


def _openvino(work: Work) -> tuple[Contender, str]:
    from llama_tp.bench.compare.openvino_peer import OpenVino

    return OpenVino(work), version("openvino-genai")


_LOADERS: Mapping[str, Callable[[Work], tuple[Contender, str]]] = {
    "llama_tp": _ours,
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
    "openvino": _openvino,
}
