"""Chat templates of published models render to the text that transformers renders, with tools and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llama_tp.text.template_process import TemplateProcess
from tests.real_vocabularies import AXOLOTL, TRL, chat_templates
from tests.tool_calls import CALL, WEATHER, outcome

pytestmark = pytest.mark.e2e

OURS = {
    TRL: ("llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "deepseek_r1_distill", "phi3"),
    AXOLOTL: ("chatml", "llama3", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "mistral_v7_tekken", "qwen3"),
}
"""Templates of the model families that are served; the others of these packages must render alike, too."""
ANSWER = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": '{"degrees": 5}'}
DIALOGS = (
    [{"role": "user", "content": "Hi <there> & 'you'\n\n  x"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": " Yes. "},
        {"role": "user", "content": "And?"},
    ],
    [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}, ANSWER],
    [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "ipython", "content": "5"},
    ],
    [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": "<think>hm</think>ok", "reasoning_content": "why", "thinking": "why"},
        {"role": "user", "content": "5"},
    ],
)


def requests() -> Iterator[dict[str, object]]:
    for messages in DIALOGS:
        for tools in (None, [WEATHER]):
            for prompt in (True, False):
                yield {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}


@pytest.mark.parametrize("wheel", OURS, ids=lambda wheel: wheel[0])
def test_every_published_template_renders_as_in_transformers(wheel):
    templates = chat_templates(wheel)
    assert set(OURS[wheel]) <= templates.keys()
    compared = 0
    for name, source in templates.items():
        template = TemplateProcess(source)
        for request in requests():
            variables = {**request, "bos_token": "<s>", "eos_token": "</s>"}
            text = outcome(lambda: template.render(variables))  # noqa: B023  # called at once
            messages = variables.pop("messages")
            expected = outcome(lambda: render_jinja_template([messages], chat_template=source, **variables)[0][0])  # noqa: B023
            assert text == expected, (name, request)
            compared += 1
        template.close()
    assert compared == len(templates) * 20
