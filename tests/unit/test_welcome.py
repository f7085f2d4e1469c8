"""What is printed once a model is ready."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from llama_tp.torchserve.properties import Properties
from llama_tp.torchserve.welcome import welcome


class Server:
    """One that is ready."""

    def __init__(self, *, can_chat=True, key_file=None, token_file=None):
        self.listeners = Properties().listeners("0.0.0.0", 9000)
        self.url = "http://127.0.0.1:9000/predictions/llama"
        self.port = 9000
        self.log_dir = Path("/somewhere/logs")
        self.served_name = "org/model"
        self.can_chat = can_chat
        self.api_key_file = key_file
        self.token_file = token_file


def command(text):
    (line,) = [line for line in text.splitlines() if line.startswith("  try it")]
    return shlex.split(line.split("try it", 1)[1])


def test_it_has_every_address_and_how_to_stop():
    text = welcome(Server(), stays=True)
    for part in (
        "http://127.0.0.1:9000/predictions/llama/1.0/v1 (OpenAI's API; model 'org/model')",
        "http://127.0.0.1:9000/predictions/llama/1.0/chat\n",
        "http://127.0.0.1:9002/metrics",
        "/somewhere/logs",
        "Ctrl-C",
    ):
        assert part in text
    assert "llama-tp stop --port 9000" in welcome(Server(), stays=False)


@pytest.mark.parametrize(("can_chat", "route"), [(True, "chat/completions"), (False, "completions")])
def test_the_curl_line_fits_the_model(can_chat, route):
    text = welcome(Server(can_chat=can_chat), stays=True)
    assert command(text)[2] == f"http://127.0.0.1:9000/predictions/llama/1.0/v1/{route}"
    assert ("/chat\n" in text) == can_chat


def test_the_key_is_read_from_its_file_whatever_that_is_called():
    text = welcome(Server(key_file=Path("/my folder/api_key")), stays=True)
    assert "Authorization: Bearer $(cat '/my folder/api_key')" in command(text)
    assert "  API key    in /my folder/api_key" in text


def test_the_command_that_is_printed_sends_token_and_key(tmp_path):
    """A shell expands it; what stands for curl prints its arguments."""
    folder = tmp_path / "it's mine"
    folder.mkdir()
    (folder / "key_file.json").write_text(json.dumps({"inference": {"key": "t0ken"}}))
    (folder / "api_key").write_text("k3y\n")
    text = welcome(Server(key_file=folder / "api_key", token_file=folder / "key_file.json"), stays=True)
    (line,) = [line for line in text.splitlines() if line.startswith("  try it")]
    script = "curl() { printf '%s\\n' \"$@\"; }; " + line.split("try it", 1)[1]
    sent = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "Authorization: Bearer t0ken" in sent
    assert "x-api-key: k3y" in sent
    assert "t0ken" not in text
    assert "k3y" not in text
