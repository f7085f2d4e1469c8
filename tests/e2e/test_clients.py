"""Programs written for OpenAI's API, through the clients that they use: litellm, LangChain and instructor."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from llama_tp.cli.bench_serve import serve as bench_serve
from llama_tp.text import Tokenizer
from tests.e2e.demo_answers import ANSWER, QUESTION
from tests.e2e.torchserve_rig import PREDICT, TorchServe
from tests.optional import imported
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:Item:UserWarning")]  # of litellm's types

ASKED = [{"role": "user", "content": QUESTION}]


class Capital(pydantic.BaseModel):
    """A country's capital."""

    country: str = pydantic.Field(max_length=20)
    capital: str = pydantic.Field(max_length=20)


@pytest.fixture(scope="module")
def base_url(demo_server: TorchServe) -> str:
    return f"http://127.0.0.1:{demo_server.inference_port}{PREDICT}/1.0/v1"


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it fetches a list of prices
    return imported("litellm")


@pytest.fixture
def chat_openai(base_url: str) -> Any:
    kind = imported("langchain_openai").ChatOpenAI
    options = {"base_url": base_url, "api_key": "none", "timeout": PATIENCE_S, "max_retries": 0}
    return kind(model="llama", temperature=0, **options)


def test_litellm_completes_and_streams(litellm: Any, base_url: str) -> None:
    options = {"model": "openai/llama", "api_base": base_url, "api_key": "none", "timeout": PATIENCE_S}

    whole = litellm.completion(messages=ASKED, temperature=0, **options)
    chunks = list(litellm.completion(messages=ASKED, temperature=0, stream=True, **options))

    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


def test_litellm_raises_its_own_errors(litellm: Any, base_url: str) -> None:
    options = {"api_base": base_url, "api_key": "none", "max_retries": 0}
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(model="openai/llama", messages=ASKED, temperature=3, **options)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/other", messages=ASKED, **options)


def test_langchain_invokes_and_streams(chat_openai: Any) -> None:
    whole = chat_openai.invoke(QUESTION)
    chunks = list(chat_openai.stream([("human", QUESTION)]))

    assert whole.content == ANSWER
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata["total_tokens"] == sum(
        whole.usage_metadata[name] for name in ("input_tokens", "output_tokens")
    )
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert chunks[0].id == chunks[-1].id


@pytest.mark.parametrize("route", ["", "/1.0/v1"], ids=["of the model", "of the API"])
def test_a_load_of_many_clients_is_answered_in_full(
    route: str, demo_server: TorchServe, demo_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `llama-tp bench serve`, which sends what `vllm bench serve` sends: three times as many as there are slots."""
    url = f"http://127.0.0.1:{demo_server.inference_port}{PREDICT}{route}"
    bench_serve(url=url, requests=24, runs=1, vocab_size=demo_tokenizer.vocab_size, api="openai")
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (run,) = document["runs"]
    assert run["openai"]["completed"] == 24
    assert document.get("counted_by") == ("usage" if route else None)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_an_object(chat_openai: Any, method: str) -> None:
    answer = chat_openai.with_structured_output(Capital, method=method).invoke(QUESTION)
    assert isinstance(answer, Capital)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor_gets_an_object(base_url: str, mode: str) -> None:
    instructor, openai = imported("instructor"), imported("openai")
    with openai.OpenAI(base_url=base_url, api_key="none", timeout=PATIENCE_S, max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=getattr(instructor.Mode, mode))
        answer = client.chat.completions.create(
            model="llama", messages=ASKED, temperature=0, max_tokens=200, response_model=Capital, max_retries=0
        )
    assert isinstance(answer, Capital)
