"""The names of contenders: an engine and the form of its weights, such as `llama.cpp Q4_1`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OURS = "llama_tp"
FORMS: Mapping[str, tuple[str, ...]] = {
    OURS: ("bf16", "int8", "int4", "float32"),
    "transformers": ("bf16", "float32"),
    "llama.cpp": ("Q4_1", "Q8_0", "bf16"),
    "openvino": ("Q4_1", "Q8_0", "bf16"),
}
"""The forms that each engine can have, in the order in which they are compared."""
PACKAGES: Mapping[str, tuple[str, str]] = {
    "transformers": ("transformers", "llama-tp[bench]"),
    "llama.cpp": ("llama_cpp", "llama-tp[peers]"),
    "openvino": ("openvino_genai", "llama-tp[peers]"),
}
"""The module that an engine needs, and what to install for it."""
READS_GGUF = ("llama.cpp", "openvino")
DEFAULT = (
    "llama_tp bf16,llama_tp int8,llama_tp int4,transformers bf16,llama.cpp Q8_0,llama.cpp Q4_1,openvino Q8_0,"
    "openvino Q4_1"
)


@dataclass(frozen=True, slots=True)
class Spec:
    """A contender."""

    engine: str
    form: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.form}"

    @property
    def is_ours(self) -> bool:
        return self.engine == OURS


def parse_specs(names: object) -> list[Spec]:
    """From names separated by commas. ValueError lists what there is, or if none is ours: ratios are of ours."""
    given = names.split(",") if isinstance(names, str) else names
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"contenders={names!r} must be names such as 'llama_tp bf16,transformers bf16'")
    specs = list(dict.fromkeys(_parse(str(name)) for name in given))
    if not any(spec.is_ours for spec in specs):
        raise ValueError(f"contenders={','.join(spec.name for spec in specs)} must include one of llama_tp's")
    return specs


def _parse(name: str) -> Spec:
    engine, _, form = name.strip().partition(" ")
    if form not in FORMS.get(engine, ()):
        known = "; ".join(f"{one} {'|'.join(forms)}" for one, forms in FORMS.items())
        raise ValueError(f"contenders: {name.strip()!r} is unknown; known: {known}")
    return Spec(engine, form)
