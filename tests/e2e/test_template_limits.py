"""A chat template that never ends costs its request, and neither the worker nor the requests after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.torchserve_rig import command_of, convert, is_gone, package, serve
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = "{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}{{ bos_token }}{{ messages[0].content }}"


def test_a_template_without_end_fails_one_request(tiny_llama2: Path, tmp_path: Path) -> None:
    convert(tiny_llama2, tmp_path)
    store = package(tmp_path, handler={"mode": "chat"})
    tokenizer_config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (store / "llama" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    work = tmp_path / "torchserve"
    work.mkdir()
    with serve(store, work) as server:
        ranks = server.ranks()
        for content, status in (("hi", 200), ("loop", 500), ("hi", 200)):
            answer = server.post({"dialog": [{"role": "user", "content": content}], "max_new_tokens": 4})
            assert answer.status == status, answer.body

        def log() -> str:  # TorchServe writes what the rank says in a thread of its own
            return (server.logs / "model_log.log").read_text(errors="replace")

        assert wait_until(lambda: "it took more than 1 s of CPU time" in log()), log()[-3000:]
        assert server.ranks() == ranks
        (renderer,) = [one for one in server.processes() if "template_renderer" in " ".join(command_of(one))]
    assert is_gone(renderer)
