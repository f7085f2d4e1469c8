"""Options from the command line, the environment and a file: which one wins, and what is refused."""

from __future__ import annotations

import os

import pytest

from llama_tp.cli.settings import WrongArguments, configurable, warn_of_unknown_variables
from llama_tp.torchserve.errors import ServerError


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("LLAMA_TP_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@configurable()
def command(
    source: str | None = None,
    *,
    port: int = 8080,
    tp: int | str | None = None,
    api_key: str | None = None,
    timeout_s: float = 1.5,
    detach: bool = False,
    config: str | None = None,
) -> None:
    got.append({"source": source, "port": port, "tp": tp, "api_key": api_key, "timeout_s": timeout_s, "detach": detach})


got: list[dict[str, object]] = []


def run(*args, **options):
    got.clear()
    command(*args, **options)
    (one,) = got
    return one


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text("port: 1\ntp: 1\napi-key: 1\n")
    assert run()["port"] == 8080
    assert run(config="c.yaml")["port"] == 1
    monkeypatch.setenv("LLAMA_TP_PORT", "2")
    monkeypatch.setenv("LLAMA_TP_TP", "2")
    monkeypatch.setenv("LLAMA_TP_CONFIG", "c.yaml")
    one = run("model", port=3)
    assert (one["port"], one["tp"], one["api_key"], one["source"]) == (3, 2, "1", "model")


def test_the_argument_can_be_configured_too(monkeypatch):
    monkeypatch.setenv("LLAMA_TP_SOURCE", "1e3")
    assert run(None)["source"] == "1e3"
    assert run("given")["source"] == "given"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True)])
def test_switches_are_words(monkeypatch, text, value):
    monkeypatch.setenv("LLAMA_TP_DETACH", text)
    assert run()["detach"] is value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("LLAMA_TP_PORT", "80a0", "LLAMA_TP_PORT: '80a0' must be an integer"),
        ("LLAMA_TP_PORT", "80.5", "LLAMA_TP_PORT: 80.5 must be an integer"),
        ("LLAMA_TP_PORT", "true", "LLAMA_TP_PORT: True must be an integer"),
        ("LLAMA_TP_TIMEOUT_S", "soon", "LLAMA_TP_TIMEOUT_S: 'soon' must be a number"),
        ("LLAMA_TP_DETACH", "maybe", "LLAMA_TP_DETACH: 'maybe' must be true or false"),
        ("LLAMA_TP_TP", "[1]", r"LLAMA_TP_TP: \[1\] must be an integer or text"),
    ],
)
def test_a_variable_of_another_type_is_refused_by_name(monkeypatch, name, text, words):
    monkeypatch.setenv(name, text)
    with pytest.raises(WrongArguments, match=words):
        run()


@configurable()
def failing(
    *, port: int = 8080, tp: int | None = None, timeout_s: float = 1.0, error: str = "", config: str | None = None
) -> None:
    raise (FileNotFoundError(2, "No such file", "--port") if error == "disk" else ServerError(error))


@pytest.mark.parametrize(
    ("message", "origin"),
    [
        ("--port 99999: a port must be an integer", "; --port is set by LLAMA_TP_PORT"),
        ("tp=6 does not divide n_heads=32", "; --tp is set in c.yaml"),
        ("tp=6, but --port 99999", "; --tp is set in c.yaml; --port is set by LLAMA_TP_PORT"),
        ("timeout_s=-1.0 must be above 0", ""),  # typed
        ("http=6: --portable --import=--port-range", ""),
    ],
)
def test_an_error_about_a_value_that_was_not_typed_says_where_it_is_from(monkeypatch, tmp_path, message, origin):
    """LLAMA_TP_PORT=99999 was reported as --port 99999, which nobody had given."""
    monkeypatch.setenv("LLAMA_TP_PORT", "99999")
    monkeypatch.setenv("LLAMA_TP_TIMEOUT_S", "2")
    (tmp_path / "c.yaml").write_text("tp: 6\nport: 1\n")
    with pytest.raises(ServerError) as caught:
        failing(config="c.yaml", timeout_s=-1.0, error=message)
    assert str(caught.value) == message + origin
    with pytest.raises(ServerError) as caught:
        failing(port=99999, tp=6, timeout_s=-1.0, error=message)
    assert str(caught.value) == message
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file: '--port'$"):
        failing(error="disk")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "prot in c.yaml is not an option; did you mean port?"),
        ("port: x", "port in c.yaml: 'x' must be an integer"),
        ("config: d.yaml", "config in c.yaml is not an option"),
        ("[1]", "must be a mapping"),
        ("port: [", "is not a YAML file"),
        ("api_key: [secret]", "api_key in c.yaml: the value must be text"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(WrongArguments, match=words) as caught:
        run(config="c.yaml")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_missing_is_refused_and_an_empty_one_is_none(tmp_path):
    with pytest.raises(WrongArguments, match="nowhere: No such file"):
        run(config="nowhere")
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert run(config="c.yaml")["port"] == 8080


def test_a_misspelled_variable_is_named_with_the_nearest_one(monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_TP_PROT", "1")
    monkeypatch.setenv("LLAMA_TP_XYZZY", "1")
    monkeypatch.setenv("LLAMA_TP_CACHE", "/c")
    monkeypatch.setenv("LLAMA_TP_PORT", "1")
    warn_of_unknown_variables(["port", "host"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "the variable LLAMA_TP_PROT has no effect: there is no such option; did you mean LLAMA_TP_PORT?"
    assert "LLAMA_TP_XYZZY" in lines[1]


def test_only_the_options_named_are_taken_from_the_environment(monkeypatch):
    seen = []

    @configurable("port")
    def narrow(*, port: int = 1, timeout_s: float = 1.0) -> None:
        seen.append((port, timeout_s))

    monkeypatch.setenv("LLAMA_TP_PORT", "2")
    monkeypatch.setenv("LLAMA_TP_TIMEOUT_S", "2")
    narrow()
    assert seen == [(2, 1.0)]
