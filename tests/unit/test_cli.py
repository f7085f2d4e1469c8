"""`llama-tp`: every command explains itself, passes its arguments on as they were typed, and fails in one line."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import llama_tp
from llama_tp.cli import command
from llama_tp.cli import main as cli
from tests.paths import CONFIGS, ROOT, SCRIPTS
from tests.published_params import DEMO
from tests.tiny_converted import convert_beside, write_originals


@pytest.fixture
def params(tmp_path):
    """Writes a params.json."""

    def write(text):
        path = tmp_path / "params.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two shards as Meta's, with their tokenizer."""
    return write_originals(tmp_path_factory.mktemp("model") / "originals", num_shards=2)


@pytest.fixture(scope="module")
def checkpoint(originals):
    """A tiny converted checkpoint, alone in its folder."""
    return convert_beside(originals, max_seq_len=128)


def is_one_line(text):
    return text.startswith("llama-tp: ") and text.count("\n") == 1 and text.endswith("\n")


def commands(group, *path):
    """(words, function) of every command, those of a group such as `bench engine` included."""
    for name, entry in group.items():
        yield from commands(entry, *path, name) if isinstance(entry, dict) else [((*path, name), entry)]


@pytest.mark.parametrize(
    ("words", "function"), [pytest.param(*one, id=" ".join(one[0])) for one in commands(cli.COMMANDS)]
)
def test_the_help_of_a_command_explains_every_argument(run, words, function):
    code, out, err = run(*words, "--help")
    text = " ".join((out + err).split())
    documentation = inspect.getdoc(function)
    assert code == 0
    assert " ".join(documentation.splitlines()[0].split()) in text
    assert "FIRE_METADATA" not in text
    for parameter in inspect.signature(function).parameters:
        assert parameter in text.lower()
        assert f"{parameter}: " in documentation, f"{parameter} is not explained"


@pytest.mark.parametrize("script", ["convert_checkpoints", "demo_weights", "download_model"])
def test_the_help_of_a_script_explains_every_argument(script):
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PAGER": "cat"})
    lines = (done.stdout + done.stderr).splitlines()
    arguments = [number for number, line in enumerate(lines) if line.lstrip().startswith("Type: ")]
    assert arguments
    for number in arguments:  # its name, type, perhaps a default, and what it is
        assert any(
            line and not line.startswith("Default: ") for line in map(str.strip, lines[number + 1 : number + 3])
        ), lines[number - 1]


def test_the_help_of_all_names_every_command(run):
    code, out, err = run("--help")
    assert code == 0
    for name in cli.COMMANDS:
        assert name in out + err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "nowhere.json"], "nowhere.json does not exist"),
        (["plan", "7"], "7"),
        (["verify", "nowhere"], "nowhere"),
        (["verify", "7"], "7"),
        (["generate", "nowhere", "Hello"], "nowhere"),
        (["generate", "nowhere", "Hello", "--temperature=-1"], "temperature=-1"),
        (["generate", "nowhere", "Hello", "--temperature=hot"], "temperature='hot'"),
        (["generate", "nowhere", "Hello", "--max_new_tokens=5.5"], "max_new_tokens=5.5"),
        (["generate", "nowhere", "Hello", "--seed=1.5"], "seed=1.5"),
        (["chat", "nowhere", "--top_p=2"], "top_p=2"),
        (["package", "nowhere.yaml", "a", "b"], "nowhere.yaml"),
        (["convert", "nowhere", "out"], "nowhere is not a folder"),
        (["inspect", "nowhere"], "nowhere is not a folder"),
        (["export", "nowhere", "out", "--format=hf"], "nowhere/manifest.json does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line_on_stderr_and_exit_code_1(run, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv)
    assert code == 1
    assert out == ""
    assert is_one_line(err), err
    assert words in err


def test_several_problems_are_one_line_still(run, params):
    code, _, err = run("plan", params({"dim": "a", "n_layers": 1}))
    assert code == 1
    assert is_one_line(err)
    assert 'dim="a"' in err
    assert "'n_heads' is missing" in err


def test_followers_say_nothing_of_what_the_first_rank_says(run, monkeypatch):
    """torchrun ends them while they wait for it. One that is still there is the only one with a problem."""
    monkeypatch.setenv("RANK", "1")
    slept = []
    monkeypatch.setattr(command.time, "sleep", slept.append)
    code, out, err = run("plan", "nowhere.json")
    assert (code, out) == (1, "")
    assert slept[0] > 1
    assert is_one_line(err)

    def is_ended(_seconds):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command.time, "sleep", is_ended)
    assert run("plan", "nowhere.json") == (143, "", "")


ABORTS = """
import atexit, os, sys
from llama_tp.cli.command import run_command

def work(status: int = 0, full: bool = False) -> None:
    if status == 9:
        raise RuntimeError("a bug")
    if full:
        sys.stdout = open("/dev/full", "w")
    print("done")
    if status:
        sys.exit(status)

atexit.register(os.abort)  # stands for torch's threads, which do this now and then
run_command(work)
"""


@pytest.mark.parametrize(
    ("argv", "code", "out"),
    [([], 0, "done\n"), (["--status=7"], 7, "done\n"), (["--status=9"], 1, ""), (["--full"], 1, ""), (["--no"], 2, "")],
)
def test_a_rank_of_torchrun_ends_with_its_command_and_does_not_take_the_interpreter_apart(argv, code, out):
    command = [sys.executable, "-c", ABORTS, *argv]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGABRT
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout) == (code, out), done.stderr


def test_an_unknown_command_or_argument_is_an_error(run, params):
    code, out, err = run("conquer")
    assert code != 0
    assert "conquer" in out + err
    code, out, err = run("plan", params(DEMO), "--size=3")
    assert code != 0
    assert out == "", "the work was done before the mistake was noticed"
    assert "size" in err


@pytest.mark.parametrize(
    "prompt",
    ["Hello, world", "1969", "1e3", "0x10", "3.10", "1,2", "[1,  2]", "{'a': 1}", "None", "True", "'quoted'", "(b)"],
)
def test_a_prompt_reaches_the_model_as_it_was_typed(run, monkeypatch, prompt):
    """python-fire reads arguments as Python literals: 1e3 became 1000.0, and 'quoted' lost its quotes."""
    from llama_tp.cli import console

    asked = []

    class Recorder:
        def complete(self, prompt, params):
            asked.append(prompt)

    monkeypatch.setattr(console, "run_console", lambda checkpoint, act, **_: act(Recorder()))
    code, _, err = run("generate", "checkpoint", prompt)
    assert (code, err) == (0, "")
    assert asked == [prompt]


def test_names_and_paths_reach_their_command_as_they_were_typed(run, monkeypatch):
    from llama_tp.cli import console

    seen = []
    monkeypatch.setattr(console, "run_console", lambda checkpoint, act, **options: seen.append((checkpoint, options)))
    run("generate", "2024", "Hello", "--tokenizer=7")
    options = {"tokenizer": "7", "dtype": "auto", "compile": "auto", "device": "auto", "threads": None}
    options["speculative_tokens"] = 0
    assert seen == [("2024", options)]


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], "auto"),
        (["--compile"], True),
        (["--nocompile"], False),
        (["--compile=true"], True),
        (["--compile=True"], True),
        (["--compile", "false"], False),
        (["--compile=auto"], "auto"),
        (["--compile=1"], "1"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "2024", "Hello"), ("chat", "2024")])
def test_an_option_that_is_true_false_or_a_word_may_be_written_as_people_do(run, monkeypatch, command, argv, value):
    from llama_tp.cli import console

    seen = []
    monkeypatch.setattr(console, "run_console", lambda checkpoint, act, **options: seen.append(options["compile"]))
    assert run(*command, *argv)[0] == 0
    assert seen == [value]
    assert type(seen[0]) is type(value)


@pytest.mark.parametrize(
    "command",
    [("generate", "Hello"), ("chat",), ("bench", "engine"), ("bench", "load"), ("bench", "quality")],
)
def test_compile_is_checked_by_every_command_that_runs_an_engine(run, checkpoint, command):
    words = list(command)
    words.insert(1 + (command[0] == "bench"), str(checkpoint))
    code, out, err = run(*words, "--compile=always", "--device=cpu")
    assert (code, out) == (1, "")
    assert err == "llama-tp: compile='always' must be one of auto, true, false\n"


def test_generate_continues_a_prompt_from_a_checkpoint(run, checkpoint):
    code, out, err = run("generate", str(checkpoint), "The quick", "--max_new_tokens=8", "--device=cpu")
    assert code == 0
    assert out.strip()
    assert "+ 8 tokens" in err or "; stop]" in err
    assert run("generate", str(checkpoint), "The quick", "--max_new_tokens=8", "--device=cpu")[1] == out
    sampled = ["generate", str(checkpoint), "The quick", "--temperature=1", "--seed=3", "--device=cpu"]
    assert run(*sampled)[1] == run(*sampled)[1]


def test_generate_refuses_a_prompt_that_does_not_fit(run, checkpoint):
    code, out, err = run("generate", str(checkpoint), "fox " * 200, "--device=cpu")
    assert (code, out) == (1, "")
    assert is_one_line(err)
    assert "fewer than max_seq_len=128" in err


@pytest.mark.parametrize("drafted", [0, 4])
def test_generate_tells_how_many_predicted_tokens_were_right(run, checkpoint, drafted):
    arguments = [str(checkpoint), "the fox and the dog and the fox and the dog and the", "--max_new_tokens=40"]
    arguments += ["--device=cpu", "--dtype=float32"]
    _, expected, _ = run("generate", *arguments)
    code, out, err = run("generate", *arguments, f"--speculative_tokens={drafted}")
    assert (code, out) == (0, expected)
    found = re.search(r"; (\d+) of (\d+) predicted tokens right; length\]", err)
    assert (found is not None) is (drafted > 0), err
    assert found is None or 0 <= int(found[1]) <= int(found[2])


def test_a_wrong_number_of_predicted_tokens_is_one_line(run, checkpoint):
    code, _, err = run("generate", str(checkpoint), "the", "--speculative_tokens=-1", "--device=cpu")
    assert code == 1
    assert is_one_line(err)
    assert "speculative_tokens=-1 must be a non-negative integer; 0 turns it off" in err


def test_chat_answers_line_by_line_and_ends_with_the_input(run, checkpoint, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n[INST]\nAnd again\n\n"))
    code, out, err = run("chat", str(checkpoint), "--max_new_tokens=5", "--seed=1", "--device=cpu")
    assert code == 0
    assert out
    assert err.count(" tokens, first after ") == 2
    assert "[INST]" in err  # the line that was refused
    assert err.startswith("Chat format: llama2 (the vocabulary is a sentencepiece model, ")


def test_generate_and_chat_take_a_tokenizer_with_a_token_beyond_the_embedding(run, checkpoint, tmp_path, monkeypatch):
    import io

    (tmp_path / "tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 512}')
    options = ["--tokenizer", str(tmp_path), "--max_new_tokens=3", "--device=cpu"]
    code, _, err = run("generate", str(checkpoint), "a <pad>", *options)
    assert (code, "3 tokens" in err) == (0, True), err
    monkeypatch.setattr(sys, "stdin", io.StringIO("a <pad>\n\n"))
    code, _, err = run("chat", str(checkpoint), *options)
    assert (code, err.count(" tokens, first after ")) == (0, 1), err


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_convert_finds_shards_and_tokenizer_by_itself(run, originals, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("convert", str(originals), "2024", "--max_seq_len=128")
    assert (code, err) == (0, "")
    assert out.startswith(f"Wrote {tmp_path / '2024'}")
    assert files_of(tmp_path / "2024") == files_of(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2024"], "model_args.json is in the checkpoint already"


def test_convert_takes_what_it_is_told_and_overwrites_only_when_it_is(run, originals, tmp_path):
    tokenizer = tmp_path / "words.model"
    tokenizer.write_bytes((originals / "tokenizer.model").read_bytes())
    options = [f"--tokenizer={tokenizer}", "--model_parallel_size=2", "--max_batch_size=5"]
    line = ["convert", str(originals), str(tmp_path / "out"), *options, f"--model_args_path={tmp_path / 'args.json'}"]
    assert run(*line)[0] == 0
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["max_seq_len"], args["max_batch_size"]) == (2048, 5)
    code, out, err = run(*line)
    assert (code, out) == (1, "")
    assert is_one_line(err)
    assert "--overwrite" in err
    assert run(*line, "--overwrite")[0] == 0


def test_convert_checks_the_number_of_shards_that_it_is_told(run, originals, tmp_path):
    code, out, err = run("convert", str(originals), str(tmp_path / "out"), "--model_parallel_size=4")
    assert (code, out) == (1, "")
    assert is_one_line(err)
    assert "pass --model_parallel_size 2" in err
    assert not (tmp_path / "out").exists()


def test_export_gives_back_what_was_converted(run, originals, checkpoint, tmp_path):
    meta, hf, again = (str(tmp_path / name) for name in ("meta", "hf", "again"))
    assert run("export", str(checkpoint), meta, "--format=meta") == (0, f"Wrote {meta}\n", "")
    names = {path.name for path in originals.iterdir()}
    assert {path.name for path in Path(meta).iterdir()} - {"checklist.chk", "manifest.json"} == names
    assert run("export", str(checkpoint), hf, "--format", "hf") == (0, f"Wrote {hf}\n", "")
    assert run("verify", hf) == (0, f"{hf}: 3 files match the manifest\n", "")
    for source in (meta, hf):
        assert run("convert", source, again, "--max_seq_len=128", "--overwrite")[0] == 0
        weights = {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}
        assert weights == {path.name: path.read_bytes() for path in Path(again).glob("*.distcp")}


def test_export_refuses_in_one_line(run, checkpoint, tmp_path):
    for options, words in (
        (["--format=gguf"], "format='gguf' must be one of meta, hf"),
        (
            ["--format=meta", "--model_parallel_size=3"],
            "does not divide n_heads=8; legal sizes",
        ),
        (["--format=meta", "--model_parallel_size=two"], "model_parallel_size='two' must be an integer"),
    ):
        code, out, err = run("export", str(checkpoint), str(tmp_path / "out"), *options)
        assert (code, out) == (1, "")
        assert is_one_line(err)
        assert words in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def asked_of_hub(monkeypatch, originals):
    """What would be downloaded; every download gives the originals."""
    from llama_tp.checkpoint.hub import download

    seen = []

    def download_nothing(model_name, **options):
        seen.append((model_name, options))
        return str(originals)

    monkeypatch.setattr(download, "download", download_nothing)
    return seen


def test_convert_takes_a_name_on_the_hub_as_source(run, checkpoint, tmp_path, monkeypatch, asked_of_hub):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("convert", "meta-llama/Llama-2-7b@v1", "out", "--max_seq_len=128")
    assert (code, err) == (0, "")
    assert asked_of_hub == [("meta-llama/Llama-2-7b", {"revision": "v1", "output": "model"})]
    assert files_of(tmp_path / "out") == files_of(checkpoint)


def test_convert_prefers_a_path_to_the_same_name_on_the_hub(run, originals, tmp_path, monkeypatch, asked_of_hub):
    (tmp_path / "meta-llama").mkdir()
    (tmp_path / "meta-llama" / "Llama-2-7b").symlink_to(originals)
    monkeypatch.chdir(tmp_path)
    assert run("convert", "meta-llama/Llama-2-7b", "out")[0] == 0
    assert asked_of_hub == []


def test_convert_downloads_nothing_that_it_could_not_write(run, checkpoint, asked_of_hub):
    code, _, err = run("convert", "meta-llama/Llama-2-7b", str(checkpoint))
    assert code == 1
    assert "pass --overwrite" in err
    assert asked_of_hub == []


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/nowhere/at/all", "models/tiny.gguf"])
def test_convert_does_not_look_on_the_hub_for_what_is_no_name_there(run, tmp_path, source, asked_of_hub):
    code, out, err = run("convert", source, str(tmp_path / "out"))
    assert (code, out) == (1, "")
    assert is_one_line(err)
    assert "hub" not in err
    assert asked_of_hub == []


@pytest.fixture
def handed_over(monkeypatch):
    """What commands hand to TorchServe, to its archiver and to the benchmark, which are not run."""
    from llama_tp.bench import serve as bench
    from llama_tp.torchserve import archive, server

    seen = []

    def start_nothing(**options):
        seen.append(options)
        return SimpleNamespace(
            start=lambda: None, wait_until_ready=lambda _: None, url="", log_dir=Path(), is_open=False
        )

    monkeypatch.setattr(server, "TorchServe", start_nothing)
    monkeypatch.setattr(archive, "build_archive", lambda **options: seen.append(options))
    monkeypatch.setattr(bench, "bench_serve", lambda *_, **options: seen.append(options))
    return seen


DOORS = {
    "package": (["package", "a.yaml", "b", "c"], {"handler"}),
    "serve": (["serve"], {"properties", "log_config"}),
    "bench serve": (["bench", "serve", "a", "b"], {"handler", "properties", "log_config"}),
}
PACKAGED = {
    "handler": ROOT / "handler" / "llama_handler.py",
    "properties": CONFIGS / "config.properties",
    "log_config": CONFIGS / "log4j2.xml",
}


@pytest.mark.parametrize("door", DOORS)
def test_handler_and_configurations_are_found_from_any_folder(run, handed_over, tmp_path, monkeypatch, door):
    """They were looked for in the folder that the command was called in."""
    argv, names = DOORS[door]
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*argv)
    assert (code, err) == (0, "")
    (options,) = handed_over
    assert {name: Path(options[name]) for name in names} == {name: PACKAGED[name] for name in names}


@pytest.mark.parametrize("door", DOORS)
def test_one_s_own_handler_and_configurations_lie_where_one_says(run, handed_over, door):
    argv, names = DOORS[door]
    assert run(*argv, *(f"--{name}=my/{name}" for name in names))[0] == 0
    (options,) = handed_over
    assert {name: str(options[name]) for name in names} == {name: f"my/{name}" for name in names}


def test_config_lists_what_comes_along_and_prints_it(run):
    code, out, err = run("config")
    assert (code, err) == (0, "")
    names = out.splitlines()
    assert {"llama2-7b.yaml", "config.production.properties", "requests/dialogs.txt"} <= set(names)
    for name in names:
        assert run("config", name) == (0, (CONFIGS / name).read_text(), "")


@pytest.mark.parametrize("name", ["llama9.yaml", "../pyproject.toml", "/etc/hostname", "."])
def test_config_prints_nothing_else(run, name):
    code, out, err = run("config", name)
    assert (code, out) == (1, "")
    assert is_one_line(err)
    assert "demo-cpu.yaml" in err


def test_the_version_is_that_of_the_library(run):
    assert run("--version") == (0, f"llama-tp {llama_tp.__version__}\n", "")


def test_verify_says_how_many_files_are_in_order_and_which_is_not(run, checkpoint, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    code, out, err = run("verify", str(copy))
    assert (code, err) == (0, "")
    assert out.startswith(
        f"{copy}: 5 files match the manifest, 21 tensors have the shapes and dtypes of model_args.json"
    )
    assert out.count("\n") == 1
    shard = next(copy.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, out, err = run("verify", str(copy))
    assert (code, out) == (1, "")
    assert is_one_line(err)
    assert shard.name in err


def test_a_character_that_the_terminal_lacks_does_not_end_a_command(checkpoint, tmp_path):
    """'ascii' codec can't encode character '\\xe8', said `serve` of its log's folder, and stopped a healthy server."""
    import shutil

    copy = shutil.copytree(checkpoint, tmp_path / "modèle")
    done = subprocess.run(
        [sys.executable, "-m", "llama_tp", "verify", str(copy)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "mod\\xe8le: " in done.stdout


@pytest.mark.parametrize(
    "command",
    [[str(Path(sys.executable).with_name("llama-tp"))], [sys.executable, "-m", "llama_tp"]],
    ids=["script", "module"],
)
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan"], "billion parameters"),
        (["--help"], "COMMANDS"),
        (["serve", "--help"], "--timeout_s"),
        (["--version"], "llama-tp "),
        (["config"], "demo-cpu.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_is_installed_and_starts_without_torch(command, argv, words, params):
    """torch takes seconds to import; these need none of it."""
    argv = [*argv, params(DEMO)] if argv == ["plan"] else argv
    done = subprocess.run(
        [*command, *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "PAGER": "cat"},
    )
    assert done.returncode == 0
    assert words in done.stdout + done.stderr
    assert " llama_tp.cli.main\n" in done.stderr
    assert " torch\n" not in done.stderr


def test_a_module_speaks_under_the_name_of_the_command():
    """It said __main__.py."""
    command = [sys.executable, "-m", "llama_tp", "verify", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert is_one_line(done.stderr)
