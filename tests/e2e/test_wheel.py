"""What `python -m build` makes, in an environment of its own and far from the clone: from `demo` to `serve`.

The demo knows that Paris is the capital of France; so does transformers on the same weights (test_demo.py).
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_tp
from llama_tp.torchserve.server import free_port_range
from tests.e2e.demo_answers import ANSWER, QUESTION
from tests.e2e.torchserve_rig import MARK, STOPPED_WITHIN_S, kill_all, processes_marked, variable_of
from tests.fresh_environment import bare_variables, install_alone
from tests.paths import CONFIGS, ROOT
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

WHERE = "import llama_tp, sys; print(llama_tp.__file__); print(*sys.path, sep='\\n')"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `python -m build` fills: an sdist, and a wheel made of it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


class User:
    """Somebody who has the wheel in an environment, and an empty folder to work in."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder = programs, folder
        self.variables = {**bare_variables(), "OMP_NUM_THREADS": "1"}

    def run(self, program: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.programs / program), *args],
            cwd=self.folder,
            env=self.variables,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def llama_tp(self, *args: str, stdin: str = "") -> str:
        """What a command prints."""
        done = self.run("llama-tp", *args, stdin=stdin)
        assert done.returncode == 0, f"{' '.join(args)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> User:
    programs = install_alone(wheel, ["serve", "demo"], tmp_path_factory.mktemp("environment"))
    return User(programs, tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def demo(user: User) -> Path:
    """The folder that `llama-tp demo` makes."""
    user.llama_tp("demo")
    return user.folder / "demo"


@pytest.fixture(scope="module")
def server(user: User, demo: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to the demo, served by two ranks with the configurations of the wheel."""
    config = user.folder / "model-config.yaml"
    config.write_text(user.llama_tp("config", "demo-cpu.yaml"))
    (user.folder / "config.properties").write_text(user.llama_tp("config", "config.properties"))
    user.llama_tp("package", config.name, "demo/converted_checkpoints")
    port = free_port_range(3)
    user.variables[MARK] = uuid.uuid4().hex
    try:
        said = user.llama_tp("serve", f"--port={port}", "--properties=config.properties", "--timeout_s=300")
        assert said.startswith(f"llama is ready at http://127.0.0.1:{port}/predictions/llama")
        yield http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    finally:
        user.run("llama-tp", "stop", f"--port={port}")
        is_clean = wait_until(lambda: not processes_marked(user.variables[MARK]), STOPPED_WITHIN_S)
        kill_all(processes_marked(user.variables[MARK]))
    assert is_clean, "stopped, but not gone"


def _send(server: http.client.HTTPConnection, method: str, body: str) -> dict[str, Any]:
    server.request(method, "/predictions/llama", body.encode())
    response = server.getresponse()
    data = response.read()
    assert response.status == 200, data
    return json.loads(data)


def test_the_wheel_holds_the_package_with_its_types_handler_and_configurations(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"llama_tp/{name}" for folder in ("handler", "configs") for name in _files(ROOT / folder)}
    expected |= set(_files(ROOT / "llama_tp"))
    assert "llama_tp/handler/llama_handler.py" in expected
    assert "llama_tp/py.typed" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_sdist_holds_what_the_tests_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    for folder in ("llama_tp", "handler", "configs", "scripts", "tests", "docs"):
        assert set(_files(ROOT / folder)) <= names
    assert {"README.md", "LICENSE", "SECURITY.md", "model-config.yaml", "pyproject.toml"} <= names


def _files(folder: Path) -> Iterator[str]:
    """By their paths in the folder above."""
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(path.relative_to(folder.parent))


def test_nothing_of_the_clone_can_be_imported(user: User) -> None:
    file, *path = user.run("python", "-c", WHERE).stdout.splitlines()
    assert Path(file).is_relative_to(user.programs.parent)
    assert not [entry for entry in path if Path(entry).is_relative_to(ROOT)]
    assert sysconfig.get_path("purelib") not in path
    assert user.llama_tp("--version") == f"llama-tp {llama_tp.__version__}\n"


def test_the_demo_answers_in_the_terminal(user: User, demo: Path) -> None:
    options = ["--temperature=0", "--dtype=float32"]
    answer = user.llama_tp("chat", "demo/converted_checkpoints", *options, stdin=f"{QUESTION}\n")
    text = user.llama_tp("generate", "demo/converted_checkpoints", "The capital of France is", *options)
    assert answer == f"{ANSWER}\n"
    assert text.startswith(" Paris")


def test_a_second_demo_keeps_the_first(user: User, demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    user.llama_tp("demo")
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_a_conversion_on_two_ranks_is_verified_and_answers_alike(user: User, demo: Path) -> None:
    torchrun = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "llama_tp"]
    done = user.run("torchrun", *torchrun, "convert", "demo/weights", "again", "--max_seq_len=256")
    assert done.returncode == 0, done.stderr
    assert "files match the manifest" in user.llama_tp("verify", "again")
    assert json.loads((user.folder / "again" / "model_args.json").read_text())["max_seq_len"] == 256
    options = ["--tokenizer=demo/weights/tokenizer.json", "--temperature=0", "--dtype=float32"]
    assert user.llama_tp("chat", "again", *options, stdin=f"{QUESTION}\n") == f"{ANSWER}\n"


def test_a_download_without_network_says_so_in_one_line(user: User) -> None:
    user.variables["HF_HUB_OFFLINE"] = "1"
    done = user.run("llama-tp", "download", "meta-llama/Llama-2-7b")
    del user.variables["HF_HUB_OFFLINE"]
    assert done.returncode == 1
    assert done.stderr.startswith("llama-tp: ")
    assert "meta-llama/Llama-2-7b" in done.stderr
    assert done.stderr.count("\n") == 1


def test_torchserve_serves_the_demo(user: User, server: http.client.HTTPConnection) -> None:
    dialog = [{"role": "user", "content": QUESTION}]
    answer = _send(server, "POST", json.dumps({"dialog": dialog, "temperature": 0, "max_new_tokens": 32}))
    assert (answer["text"], answer["finish_reason"]) == (ANSWER, "stop")
    answer = _send(server, "PUT", user.llama_tp("config", "requests/dialogs.txt"))  # as curl -T does
    assert answer["usage"]["completion_tokens"] > 0


def test_the_example_with_curl_asks_it(server: http.client.HTTPConnection) -> None:
    url = f"http://{server.host}:{server.port}/predictions/llama"
    done = subprocess.run(
        [ROOT / "examples" / "request.sh", url],
        env={**os.environ, "no_proxy": "*"},
        capture_output=True,
        text=True,
        check=True,
    )
    whole, *chunks = done.stdout.splitlines()
    assert json.loads(whole)["text"] == ANSWER
    assert "".join(json.loads(chunk)["text"] for chunk in chunks) == " 4, 5, 6"


def test_the_ranks_run_the_handler_and_the_library_of_the_wheel(user: User, server: http.client.HTTPConnection) -> None:
    packaged = user.folder / "model_store" / "llama" / "llama_handler.py"
    assert packaged.read_bytes() == (ROOT / "handler" / "llama_handler.py").read_bytes()
    ranks = [process for process in processes_marked(user.variables[MARK]) if variable_of(process, "LOCAL_RANK")]
    assert len(ranks) == 2
    for rank in ranks:
        command = [rank.cmdline()[0], "-c", WHERE]
        said = subprocess.run(
            command, cwd=rank.cwd(), env=rank.environ(), capture_output=True, text=True, check=True
        ).stdout
        assert Path(said.splitlines()[0]).is_relative_to(user.programs.parent)
        assert str(ROOT) not in said


def test_the_configuration_that_was_given_is_left_as_it_was(user: User, server: http.client.HTTPConnection) -> None:
    """TorchServe was started in that folder; its own one, with other ports, used to be written over it."""
    assert (user.folder / "config.properties").read_text() == (CONFIGS / "config.properties").read_text()
