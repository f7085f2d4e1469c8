"""The handler behind a real TorchServe with two ranks, fed by a model that knows its text by heart."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_tp.text import Tokenizer, load_tokenizer
from tests.e2e.torchserve_rig import (
    CONFIG,
    CUT_OFF,
    PREDICT,
    Response,
    Stream,
    TorchServe,
    convert,
    is_gone,
    package,
    serve,
)
from tests.tiny_llama2 import (
    ANSWER,
    DIALOG,
    ENDLESS,
    LONG_ANSWER,
    LONG_DIALOG,
    LONG_REQUEST,
    PASSAGE,
    PASSAGE_REQUEST,
    REST_OF_PASSAGE,
    VERY_LONG_REQUEST,
    VERY_LONG_SEQ_LEN,
    passage_prompt,
)
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.e2e

NUM_SLOTS = 8
MAX_SEQ_LEN = VERY_LONG_SEQ_LEN
DEFAULTS = {"max_new_tokens": 24, "temperature": 1.9, "top_p": 0.95, "manual_seed": 40, "mode": "chat"}
ABANDON_AFTER_S = 3.0
NUM_TOGETHER = 500
"""Tokens of a stream: more than a client may have left unread."""
MAX_N = 16
"""Outputs of a request."""
CUT_OFF_WITHIN_S = 0.5 * CONFIG["responseTimeout"]
"""Before TorchServe itself would give up its ranks."""


@pytest.fixture(scope="module")
def store(tiny_llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model store that the README's steps make."""
    work = tmp_path_factory.mktemp("model")
    convert(tiny_llama2, work)
    limits = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": NUM_SLOTS, "abandon_after_s": ABANDON_AFTER_S}
    return package(work, config={"batchSize": NUM_SLOTS}, handler={**limits, **DEFAULTS})


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    with serve(store, tmp_path_factory.mktemp("torchserve")) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(tiny_llama2: Path) -> Tokenizer:
    return load_tokenizer(tiny_llama2 / "tokenizer.model")


@dataclass(frozen=True)
class Answer:
    """What a client got, streamed or not."""

    text: str
    finish_reason: str
    usage: Mapping[str, int]


def ask(server: TorchServe, request: Mapping[str, Any]) -> Answer:
    if not request.get("stream"):
        return answer_in(server.post(request))
    with server.stream(request) as stream:
        assert stream.status == 200
        chunks = [chunk for _, chunk in stream]
    last = chunks[-1]
    return Answer("".join(chunk["text"] for chunk in chunks), last["finish_reason"], last["usage"])


def answer_in(response: Response) -> Answer:
    assert response.status == 200, response.body
    assert response.headers.get_content_type() == "application/json"
    return Answer(**response.json())


def ask_all(server: TorchServe, requests: list[Mapping[str, Any]]) -> list[Answer]:
    """All at the same time."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: ask(server, request), requests))


def first_chunk(stream: Stream) -> float:
    """When it arrived."""
    arrival, _ = next(iter(stream))
    return arrival


# --- answers


@pytest.mark.parametrize("num_words", [2, 3, 10, 47])
def test_the_beginning_of_the_passage_is_completed_to_the_letter(
    server: TorchServe, tokenizer: Tokenizer, num_words: int
) -> None:
    prompt = passage_prompt(num_words)

    answer = ask(server, {**PASSAGE_REQUEST, "prompt": prompt})

    assert prompt + answer.text == PASSAGE
    assert answer.finish_reason == "stop"
    num_prompt, num_all = len(tokenizer.encode(prompt, bos=True)), len(tokenizer.encode(PASSAGE, bos=True))
    assert answer.usage == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_all - num_prompt,
        "total_tokens": num_all,
    }


def test_a_stream_is_lines_of_json_that_make_up_the_whole_answer(server: TorchServe, tokenizer: Tokenizer) -> None:
    whole = ask(server, PASSAGE_REQUEST)

    with server.stream({**PASSAGE_REQUEST, "stream": True}) as stream:
        arrivals, chunks = zip(*stream, strict=True)

    *others, last = chunks
    assert all(chunk.keys() == {"text", "ids"} for chunk in others)
    assert last.keys() == {"text", "ids", "finish_reason", "usage"}
    assert (last["finish_reason"], last["usage"]) == (whole.finish_reason, whole.usage)
    assert "".join(chunk["text"] for chunk in chunks) == whole.text == REST_OF_PASSAGE
    ids = [token for chunk in chunks for token in chunk["ids"]]
    assert len(ids) == whole.usage["completion_tokens"]
    assert tokenizer.decode(tokenizer.encode(PASSAGE_REQUEST["prompt"]) + ids) == PASSAGE
    assert len(set(arrivals)) > 10
    assert any(begins_early(server) for _ in range(3)), "all of it came at once"


def begins_early(server: TorchServe) -> bool:
    """Whether a stream's first line has come before half of its time has passed; it has not if this process did not run
    meanwhile."""
    asked = time.monotonic()
    with server.stream({**LONG_REQUEST, "max_new_tokens": 1000}) as stream:
        first, *_, last = [arrival for arrival, _ in stream]
    return first - asked < 0.5 * (last - asked)


def test_no_chunk_of_a_stream_ends_in_half_a_character(server: TorchServe) -> None:
    with server.stream({**PASSAGE_REQUEST, "stream": True}) as stream:
        chunks = [chunk for _, chunk in stream]

    assert all("\ufffd" not in chunk["text"] for chunk in chunks)
    assert sum(not chunk["text"] for chunk in chunks) > 0, "the whale has four bytes; some chunks complete none"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("dialog", "expected"), [(DIALOG, ANSWER), (LONG_DIALOG, LONG_ANSWER)])
def test_a_dialog_is_answered(server: TorchServe, dialog: list[dict[str, str]], expected: str, stream: bool) -> None:
    request = {"dialog": dialog, "mode": "chat", "max_new_tokens": 50, "temperature": 0, "stream": stream}

    answer = ask(server, request)

    assert (answer.text, answer.finish_reason) == (expected, "stop")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/json", "application/octet-stream"])
@pytest.mark.parametrize("method", ["POST", "PUT"])  # PUT is what curl -T sends
def test_the_answer_does_not_depend_on_the_content_type(
    server: TorchServe, method: str, content_type: str | None
) -> None:
    body = json.dumps(PASSAGE_REQUEST).encode()

    response = server.request(method, PREDICT, body, content_type)

    assert answer_in(response).text == REST_OF_PASSAGE


def test_a_stop_string_ends_the_answer_before_it(server: TorchServe) -> None:
    whole = ask(server, {**PASSAGE_REQUEST, "stop": ["Ahab", "long prec"]})
    streamed = ask(server, {**PASSAGE_REQUEST, "stop": "long prec", "stream": True})

    assert whole.text == " Some years ago—never mind how "
    assert whole.finish_reason == "stop"
    assert whole.usage["completion_tokens"] < 60
    assert streamed == whole


@pytest.mark.parametrize("stream", [False, True])
def test_a_single_token_is_a_complete_answer(server: TorchServe, stream: bool) -> None:
    answer = ask(server, {"prompt": ENDLESS, "max_new_tokens": 1, "temperature": 0, "stream": stream})

    assert answer.text == " tick"
    assert answer.finish_reason == "length"
    assert answer.usage["completion_tokens"] == 1


def test_max_new_tokens_is_exact(server: TorchServe) -> None:
    answer = ask(server, {"prompt": ENDLESS, "max_new_tokens": 500, "temperature": 0})

    assert answer.text == " tick tock" * 250
    assert (answer.finish_reason, answer.usage["completion_tokens"]) == ("length", 500)


def test_a_prompt_one_token_short_of_the_context_gets_one(server: TorchServe, tokenizer: Tokenizer) -> None:
    tick, tock = tokenizer.encode(ENDLESS)[:2]
    ids = [tokenizer.bos_id, *([tick, tock] * MAX_SEQ_LEN)][: MAX_SEQ_LEN - 1]

    answer = ask(server, {"prompt": ids, "temperature": 0})

    assert (answer.text, answer.finish_reason) == (" tock" if ids[-1] == tick else " tick", "length")
    assert answer.usage == {
        "prompt_tokens": MAX_SEQ_LEN - 1,
        "completion_tokens": 1,
        "total_tokens": MAX_SEQ_LEN,
    }


def test_a_seed_reproduces_an_answer(server: TorchServe) -> None:
    request = {"prompt": "My dear", "max_new_tokens": 40, "temperature": 2.0}

    answers = {seed: [ask(server, {**request, "seed": seed}).text for _ in range(2)] for seed in (1, 2, 3)}

    assert all(first == second for first, second in answers.values())
    assert len({first for first, _ in answers.values()}) == 3


def test_the_defaults_are_those_of_the_configuration(server: TorchServe) -> None:
    bare = {"prompt": "My dear"}
    explicit = {**bare, **{key: DEFAULTS[key] for key in ("max_new_tokens", "temperature", "top_p")}, "seed": 40}
    expected = ask(server, bare)
    others = [
        ask(server, {**explicit, key: value}).text
        for key, value in (("max_new_tokens", 25), ("temperature", 0.7), ("top_p", 0.3), ("seed", 41))
    ]

    assert expected == ask(server, explicit)
    assert expected.usage["completion_tokens"] == DEFAULTS["max_new_tokens"]
    assert expected.text not in others
    assert server.post({}).json()["error"]["param"] == "dialog", "with mode: chat it is a dialog that is missing"


@pytest.mark.parametrize("special", ["<s>", "</s>", "<|eot_id|>", "<|im_end|>", "<unk>", "<0x0A>"])
def test_the_spelling_of_a_special_token_is_text(server: TorchServe, tokenizer: Tokenizer, special: str) -> None:
    completion = ask(server, {"prompt": f"a{special}b", "max_new_tokens": 1})
    dialog = [{"role": "user", "content": f"a{special}b"}]
    chat = ask(server, {"dialog": dialog, "max_new_tokens": 1})

    num_prompt = 1 + len(tokenizer.encode(f"a{special}b"))
    assert num_prompt > 5
    assert completion.usage["prompt_tokens"] == num_prompt
    assert chat.usage["prompt_tokens"] == 1 + len(tokenizer.encode(f"[INST] a{special}b [/INST]"))


def test_the_log_probabilities_of_a_text_known_by_heart_are_almost_0(server: TorchServe, tokenizer: Tokenizer) -> None:
    request = {**PASSAGE_REQUEST, "logprobs": True, "top_logprobs": 5}

    answer = server.post(request).json()
    with server.stream({**request, "stream": True}) as stream:
        streamed = [record for _, chunk in stream for record in chunk["logprobs"]]

    records = answer["logprobs"]
    assert answer["text"] == REST_OF_PASSAGE
    assert [record["id"] for record in streamed] == [record["id"] for record in records]
    assert bytes(byte for record in records for byte in record["bytes"]).decode() == REST_OF_PASSAGE
    for record in records:
        assert -0.5 < record["logprob"] <= 0
        assert len(record["top_logprobs"]) == 5
        assert record["top_logprobs"][0] == {name: record[name] for name in ("id", "token", "bytes", "logprob")}


def test_several_outputs_are_those_of_several_seeds(server: TorchServe) -> None:
    request = {"prompt": "My dear", "max_new_tokens": 40, "temperature": 2.0, "seed": 5}

    alone = [ask(server, {**request, "seed": 5 + i}).text for i in range(3)]
    answer = server.post({**request, "n": 3}).json()
    with server.stream({**request, "n": 3, "stream": True}) as stream:
        chunks = [chunk for _, chunk in stream]

    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(alone))
    for index, text in enumerate(alone):
        assert "".join(chunk["text"] for chunk in chunks if chunk["index"] == index) == text
    assert [chunk["usage"] for chunk in chunks if "usage" in chunk] == [answer["usage"]]


def test_an_answer_goes_on_beyond_its_end_where_that_is_asked_for(server: TorchServe) -> None:
    whole = ask(server, PASSAGE_REQUEST)
    num_more = whole.usage["completion_tokens"] + 5

    longer = ask(server, {**PASSAGE_REQUEST, "min_new_tokens": num_more})
    ignoring = ask(server, {**PASSAGE_REQUEST, "max_new_tokens": num_more, "ignore_eos": True})

    assert longer.usage["completion_tokens"] >= num_more
    assert (ignoring.finish_reason, ignoring.usage["completion_tokens"]) == ("length", num_more)


def test_a_bias_and_a_stop_id_act_on_their_tokens(server: TorchServe, tokenizer: Tokenizer) -> None:
    tock = tokenizer.encode(ENDLESS)[1]
    request = {"prompt": ENDLESS, "max_new_tokens": 10, "temperature": 0}

    stopped = ask(server, {**request, "stop_token_ids": [tock]})
    banned = ask(server, {**request, "logit_bias": {str(tock): -100}})
    penalized = ask(server, {**request, "frequency_penalty": 2, "presence_penalty": 2, "repetition_penalty": 10})

    assert (stopped.text, stopped.finish_reason) == (" tick", "stop")
    assert "tock" not in banned.text
    assert penalized.text != ask(server, request).text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_time_is_up_is_what_there_is(server: TorchServe, stream: bool) -> None:
    """The time is that of a fifth of the answer, as measured."""
    begun = time.monotonic()
    ask(server, {**LONG_REQUEST, "stream": stream, "max_new_tokens": LONG_REQUEST["max_new_tokens"] // 5})
    fifth_s = round(time.monotonic() - begun, 2)

    answer = ask(server, {**LONG_REQUEST, "stream": stream, "timeout_s": max(0.5, fifth_s)})

    assert answer.finish_reason == "timeout"
    assert answer.text.startswith(" tick tock tick")
    assert 0 < answer.usage["completion_tokens"] < LONG_REQUEST["max_new_tokens"]


# --- many at once

MIXED = [
    PASSAGE_REQUEST,
    {**PASSAGE_REQUEST, "prompt": passage_prompt(40), "stream": True},
    {"dialog": DIALOG, "max_new_tokens": 50, "temperature": 0, "stream": True},
    {"prompt": ENDLESS, "max_new_tokens": 150, "temperature": 0},
    {"prompt": "My dear", "max_new_tokens": 120, "temperature": 2.0, "seed": 5, "stream": True},
    {"prompt": "water — 🐋 " * 20, "max_new_tokens": 60, "temperature": 1.2, "top_p": 0.8, "seed": 6},
    {"prompt": passage_prompt(12), "max_new_tokens": 90, "temperature": 1.5, "top_k": 20, "seed": 7, "stream": True},
    {**PASSAGE_REQUEST, "stop": "sail", "stream": True},
]


@pytest.fixture(scope="module")
def solo(server: TorchServe) -> list[Answer]:
    """What each of MIXED is answered when it is alone."""
    return [ask(server, request) for request in MIXED]


def test_requests_that_run_together_get_what_they_get_alone(server: TorchServe, solo: list[Answer]) -> None:
    for _ in range(2):
        assert ask_all(server, MIXED) == solo


def test_a_bad_request_leaves_its_neighbours_identical_to_the_letter(server: TorchServe, solo: list[Answer]) -> None:
    bad = [b"not json", b'{"prompt": "\\ud800"}', {"prompt": "a", "temperature": 7}, {"prompt": [10**6]}]
    with ThreadPoolExecutor(len(MIXED) + 1) as pool:
        good = [pool.submit(ask, server, request) for request in MIXED]
        time.sleep(0.05)
        refused = list(pool.map(server.post, bad))
        answers = [future.result() for future in good]

    assert [response.status for response in refused] == [400] * len(bad)
    assert answers == solo


def test_more_requests_than_slots_are_all_answered(server: TorchServe, solo: list[Answer]) -> None:
    assert ask_all(server, MIXED * 3) == solo * 3


# --- bad input: the table is in bad_input.py


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_says_both_numbers_of_an_exceeded_context(server: TorchServe, stream: bool) -> None:
    request = {"prompt": [5] * 16_000, "max_new_tokens": 500, "stream": stream}

    message = server.post(request).json()["error"]["message"]

    assert all(number in message for number in ("16000", "500", str(MAX_SEQ_LEN)))


def test_null_means_that_a_field_is_not_given(server: TorchServe) -> None:
    nulls = dict.fromkeys(("dialog", "mode", "top_p", "seed", "stop", "logit_bias", "n", "timeout_s", "stream"))

    assert ask(server, {**PASSAGE_REQUEST, **nulls}) == ask(server, PASSAGE_REQUEST)


def test_a_huge_prompt_does_not_stall_a_stream(server: TorchServe) -> None:
    gaps = (longest_gap_beside_huge_prompts(server) for _ in range(3))  # a loaded machine may stall one by itself
    assert any(gap < 0.5 for gap in gaps)


def longest_gap_beside_huge_prompts(server: TorchServe) -> float:
    """In a stream that is read until the last of them has been refused."""
    with server.stream(LONG_REQUEST) as stream, ThreadPoolExecutor(1) as pool:
        arrivals = [first_chunk(stream)]
        refused = [pool.submit(server.post, {"prompt": "whale 🐋 é" * 80_000}) for _ in range(3)]
        for arrival, _ in stream:
            arrivals.append(arrival)
            if all(future.done() for future in refused):
                break

    assert [future.result().json()["error"]["code"] for future in refused] == ["context_length_exceeded"] * 3
    return max(later - earlier for earlier, later in pairwise(arrivals))


def test_the_server_answers_after_all_of_this(server: TorchServe) -> None:
    assert ask(server, PASSAGE_REQUEST).text == REST_OF_PASSAGE
    assert "Traceback" not in (server.logs / "model_log.log").read_text()


# --- clients that leave


def run_at_once(server: TorchServe, num_requests: int, request: Mapping[str, Any] = VERY_LONG_REQUEST) -> bool:
    """Whether that many new requests generate at the same time: all get NUM_TOGETHER tokens after the last has
    begun."""
    begun: list[int] = []
    all_have_begun = threading.Event()

    def tokens_together(index: int) -> int:
        together = 0
        with server.stream(request, timeout=5 * PATIENCE_S) as stream:  # one may wait for the end of another
            for number, (_, chunk) in enumerate(stream):
                if number == 0:
                    begun.append(index)
                    if len(begun) == num_requests:
                        all_have_begun.set()
                elif all_have_begun.is_set():
                    together += len(chunk["ids"])
                    if together >= NUM_TOGETHER:
                        break
        return together

    with ThreadPoolExecutor(num_requests) as pool:
        together = list(pool.map(tokens_together, range(num_requests)))
    assert len(begun) == num_requests
    return min(together) >= NUM_TOGETHER


def test_as_many_requests_as_there_are_slots_run_at_once_and_no_more(server: TorchServe) -> None:
    assert run_at_once(server, NUM_SLOTS)
    assert not run_at_once(server, NUM_SLOTS + 1, {**LONG_REQUEST, "max_new_tokens": 3 * NUM_TOGETHER})


def num_abandonments(server: TorchServe) -> int:
    return (server.logs / "model_log.log").read_text().count("nobody has polled")


def test_a_sole_client_that_leaves_frees_its_place(server: TorchServe) -> None:
    stream = server.stream({**VERY_LONG_REQUEST, "n": MAX_N})  # many times ABANDON_AFTER_S, on a fast machine, too
    first_chunk(stream)
    leader = server.ranks()[0]
    assert any(leader.cpu_percent(0.5) > 25 for _ in range(5)), "it generates"
    before = num_abandonments(server)

    stream.close()

    assert wait_until(lambda: num_abandonments(server) > before), "it goes on for nobody"
    assert any(leader.cpu_percent(0.5) < 15 for _ in range(5)), "it goes on for nobody"
    assert run_at_once(server, NUM_SLOTS)


def test_clients_that_leave_free_their_places_and_change_nothing_for_others(
    server: TorchServe, solo: list[Answer]
) -> None:
    staying = [4, 6]
    with ThreadPoolExecutor(2) as pool:
        leaving = [server.stream(VERY_LONG_REQUEST) for _ in range(NUM_SLOTS - len(staying))]
        stayed = [pool.submit(ask, server, MIXED[index]) for index in staying]
        for stream in leaving:
            first_chunk(stream)
            stream.close()
        answers = [future.result() for future in stayed]

    assert answers == [solo[index] for index in staying]
    assert run_at_once(server, NUM_SLOTS)


def test_clients_that_come_and_go_at_once_leave_nothing_behind(server: TorchServe) -> None:
    before = server.ranks()
    for _ in range(3):
        connections = [http.client.HTTPConnection("127.0.0.1", server.inference_port) for _ in range(2 * NUM_SLOTS)]
        for connection in connections:
            connection.request("POST", PREDICT, json.dumps(VERY_LONG_REQUEST))
        for connection in connections:
            connection.close()

    assert run_at_once(server, NUM_SLOTS)
    assert server.ranks() == before


# --- faults


GONE_WITHIN_S = 25.0
"""Before a rank would give up to wait for a frontend."""


def left_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after GONE_WITHIN_S."""
    wait_until(lambda: all(map(is_gone, processes)), GONE_WITHIN_S)
    return [process for process in processes if not is_gone(process)]


@pytest.mark.parametrize("victim", ["leader", "follower", "agent"])
def test_after_a_kill_streams_end_and_what_was_queued_is_served_or_ends_with_them(
    server: TorchServe, victim: str
) -> None:
    before, ranks, agent = server.processes(), server.ranks(), server.agent()
    with ThreadPoolExecutor(NUM_SLOTS + 1) as pool:
        streams = [server.stream(VERY_LONG_REQUEST) for _ in range(NUM_SLOTS)]
        for stream in streams:
            first_chunk(stream)
        queued = pool.submit(server.post, PASSAGE_REQUEST)
        time.sleep(0.2)

        {"leader": ranks[0], "follower": ranks[1], "agent": agent}[victim].kill()
        killed = time.monotonic()
        ends = list(pool.map(Stream.how_it_ends, streams))
        assert time.monotonic() - killed < CUT_OFF_WITHIN_S
        assert ends == ["cut off"] * NUM_SLOTS
        assert left_of([*ranks.values(), agent]) == []

        wait_until(lambda: not server.is_ready(), 5)  # TorchServe may say so for a moment longer
        server.wait_ready()
        # TorchServe may hand it to a rank that lives for another moment: then it ends with that rank, as streams do.
        with suppress(*CUT_OFF):
            response = queued.result(PATIENCE_S)
            assert response.status >= 500 or answer_in(response).text == REST_OF_PASSAGE

    assert ask(server, PASSAGE_REQUEST).text == REST_OF_PASSAGE
    assert wait_until(lambda: len(server.processes()) == len(before)), "no orphans, nothing missing"
    assert run_at_once(server, NUM_SLOTS)


def test_when_the_frontend_is_killed_nothing_stays_behind(store: Path, tmp_path: Path) -> None:
    with serve(store, tmp_path) as server:
        stream = server.stream(VERY_LONG_REQUEST)
        first_chunk(stream)
        processes = server.processes()

        server.frontend().kill()

        assert stream.how_it_ends() == "cut off"
        assert left_of(processes) == []
        assert server.processes() == [], "the agent has started new ranks"
