"""How a model's publisher recommends to sample: generation_config.json, which lies next to the tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llama_tp.engine.sampling_params import KNOBS, Knob
from llama_tp.serving.encoding import shown
from llama_tp.text.siblings import read_generation_config

log = logging.getLogger(__name__)


def published_sampling(tokenizer: Path) -> dict[str, float]:
    """Values of the KNOBS of `SamplingParams` in the generation_config.json of a tokenizer's file or folder, by name.

    What cannot be used is logged and left out: recommendations are no reason to refuse a model.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    try:
        config = read_generation_config(folder)
    except (OSError, ValueError) as error:
        log.warning("the publisher's sampling defaults are not used: %s", error)
        return {}
    given = {knob: config[knob.name] for knob in KNOBS if config.get(knob.name) is not None}
    usable = {knob.name: _number(knob, value) for knob, value in given.items()}
    for knob, value in given.items():
        if usable[knob.name] is None:
            problem = f"{knob.name}={shown(value)} is not used; it must be a number in {knob.api}"
            log.warning("generation_config.json: %s", problem)
    return {name: number for name, number in usable.items() if number is not None}


def _number(knob: Knob, value: Any) -> float | None:
    """The value as requests may have it, or None."""
    if type(value) not in (int, float):
        return None
    if knob.name == "top_k" and value == -1:  # another way to say all
        value = 0
    if value not in knob.api or (knob.kind is int and value != int(value)):
        return None
    return knob.kind(value)
