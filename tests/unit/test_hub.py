"""The download against a stand-in of the hub on this machine: what is fetched, what is said, and that it resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from llama_tp.checkpoint.hub import download as hub_module
from llama_tp.checkpoint.hub import record
from llama_tp.checkpoint.hub.record import HubFile
from tests.hub_stand_in import COMMIT, serving, variables
from tests.paths import SCRIPTS

WEIGHTS = b"weights of the original" * 50_000
LLAMA2 = {
    "consolidated.00.pth": WEIGHTS,
    "params.json": b"{}",
    "tokenizer.model": b"tokens",
    "checklist.chk": b"sums",
    "LICENSE.txt": b"licence",
    "USE_POLICY.md": b"policy",
    "README.md": b"readme",
    "model.safetensors": b"not these",
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
}
HUGGING_FACE = {
    "config.json": json.dumps(CONFIG).encode(),
    "model-00001-of-00002.safetensors": WEIGHTS[:60_000],
    "model-00002-of-00002.safetensors": WEIGHTS[:70_000],
    "model.safetensors.index.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"tokens",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"template",
    "LICENSE.txt": b"licence",
    "USE_POLICY.md": b"policy",
}
TOKENIZER = set(HUGGING_FACE) - {"config.json", "LICENSE.txt", "USE_POLICY.md"}
TOKENIZER = {name for name in TOKENIZER if "safetensors" not in name}
DUPLICATES = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same in one file",
    "model.Q4_K_M.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "README.md": b"readme",
}
MISTRAL_PARAMS = {"dim": 64, "n_layers": 2, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 4, "norm_eps": 1e-5}
MISTRAL = {
    "consolidated.safetensors": WEIGHTS[:50_000],
    "params.json": json.dumps(MISTRAL_PARAMS).encode(),
    "tokenizer.model.v3": b"tokens",
}
MIXTRAL = MISTRAL | {"params.json": json.dumps(MISTRAL_PARAMS | {"moe": {"num_experts": 8}}).encode()}
GGUF = {
    "tiny-Q8_0.gguf": b"GGUF of one file",
    "tiny-Q4_0.gguf": b"GGUF of another",
    "F16/big-00001-of-00002.gguf": b"GGUF 1",
    "F16/big-00002-of-00002.gguf": b"GGUF 2",
    "half-00001-of-00002.gguf": b"GGUF 1",
}
REPOSITORIES = {
    "meta-llama/Llama-2-7b": LLAMA2,
    "meta-llama/Llama-3.2-1B": {f"original/{name}": data for name, data in LLAMA2.items()} | HUGGING_FACE,
    "meta-llama/Llama-2-7b-hf": HUGGING_FACE | DUPLICATES,
    "tiny/single": HUGGING_FACE | {"model.safetensors": b"all in one"},
    "gated/listed": LLAMA2,
    "mistralai/both": HUGGING_FACE | MISTRAL | {"README.md": b"readme"},
    "mistralai/own": MISTRAL | {"README.md": b"readme", "tekken.json": b"{}"},
    "mistralai/experts": MIXTRAL,
    "mistralai/tekken": {name: data for name, data in MISTRAL.items() if "model" not in name} | {"tekken.json": b"{}"},
    "tiny/GGUF": GGUF | {"README.md": b"readme"},
    "old/pickles": {"config.json": HUGGING_FACE["config.json"], "pytorch_model.bin": b"pickle"},
    "google/gemma-9": HUGGING_FACE | {"config.json": b'{"architectures": ["GemmaForCausalLM"]}'},
}


REFUSALS = {
    "gated/model": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to gated/model is restricted"}),
    "gated/listed/resolve": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
    "private/model": (401, {"X-Error-Message": "Invalid username or password."}),
    "stale-token/model": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "fine-grained/model": (403, {"X-Error-Message": "Please enable access to public gated repositories"}),
    "busy/model": (429, {"Retry-After": "60"}),
    "broken/model": (503, {}),
}


@pytest.fixture
def hub():
    with serving(REPOSITORIES, REFUSALS) as server:
        yield server


def download(tmp_path, port, *args, **env):
    """Run the script."""
    return run_python(tmp_path, port, str(SCRIPTS / "download_model.py"), *args, **env)


def llama_tp(tmp_path, port, *args, **env):
    return run_python(tmp_path, port, "-m", "llama_tp", *args, **env)


def run_python(tmp_path, port, *args, **env):
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=tmp_path, env=variables(port, tmp_path / "home") | env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b", "meta-llama/Llama-3.2-1B"])
def test_the_originals_and_only_they_are_fetched_and_their_folder_is_printed(hub, tmp_path, name):
    done = download(tmp_path, hub.server_port, "--model_name", name)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert (tmp_path / folder).is_relative_to(tmp_path / "model")
    wanted = set(LLAMA2) - {"README.md", "model.safetensors"}
    assert {path.name for path in (tmp_path / folder).iterdir()} == wanted
    assert (tmp_path / folder / "consolidated.00.pth").read_bytes() == WEIGHTS
    assert not any("safetensors" in path or "README" in path for _, path, _ in hub.requests)


def test_a_transfer_that_breaks_off_is_taken_up_where_it_broke(hub, tmp_path, monkeypatch):
    # The client counts what it has in chunks of 10 MB.
    weights = bytes(range(256)) * 90_000
    monkeypatch.setitem(LLAMA2, "consolidated.00.pth", weights)
    hub.cut_after = 12_000_000
    done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b", "--output", "elsewhere")
    assert done.returncode == 0, done.stderr
    ranges = [range_ for method, path, range_ in hub.requests if method == "GET" and path.endswith(".pth")]
    assert [int(re.findall(r"\d+", range_ or "0")[0]) for range_ in ranges] == [0, 10_485_760, 20_971_520]
    assert (tmp_path / done.stdout.strip().splitlines()[-1] / "consolidated.00.pth").read_bytes() == weights


def test_an_error_of_whatever_http_library_is_one_line(monkeypatch):
    class RemoteProtocolError(Exception):
        pass

    def broken(*_args, **_kwargs):
        raise RemoteProtocolError("peer closed connection\nwithout a word")

    monkeypatch.setattr(hub_module, "_list_files", lambda *_: (COMMIT, {"consolidated.00.pth": HubFile(1)}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(
        ValueError, match=r"connection was lost \(RemoteProtocolError: peer closed connection\): .*run this again"
    ):
        hub_module.download("meta-llama/Llama-2-7b")


def test_a_refusal_that_the_client_calls_a_missing_file_is_told_by_its_status(monkeypatch):
    """While files are fetched the client reports a 429 as "cannot find the file, check your internet connection"."""

    class TooManyRequests(Exception):
        response = SimpleNamespace(status_code=429, headers={})

    def limited(*_args, **_kwargs):
        raise LocalEntryNotFoundError("An error happened while trying to locate the file") from TooManyRequests()

    monkeypatch.setattr(hub_module, "_list_files", lambda *_: (COMMIT, {"consolidated.00.pth": HubFile(1)}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", limited)
    with pytest.raises(ValueError, match=r"rate-limited by the hub \(429\)"):
        hub_module.download("meta-llama/Llama-2-7b")


def test_a_full_disk_is_not_called_a_broken_connection(monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_module, "_list_files", lambda *_: (COMMIT, {"consolidated.00.pth": HubFile(1)}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        hub_module.download("meta-llama/Llama-2-7b")


FOUR_SHARDS = {f"consolidated.{rank:02d}.pth": HubFile(3) for rank in range(4)}


@pytest.fixture
def half_a_download(tmp_path):
    """Two of four shards in the hub's layout, as huggingface_hub 0.25 to 1.x returns them when it cannot ask."""
    folder = tmp_path / "models--meta-llama--Llama-2-70b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in list(FOUR_SHARDS)[:2]:
        (folder / name).write_bytes(b"abc")
    return folder


@pytest.mark.parametrize("is_reachable", [True, False])
def test_half_a_download_is_not_passed_off_as_a_whole_one(monkeypatch, half_a_download, is_reachable):
    """Exit code 0 and 2 of 4 shards: the client returns whatever folder is there."""

    def list_files(*_args):
        if not is_reachable:
            raise ConnectionError("Network is unreachable")
        return COMMIT, FOUR_SHARDS

    monkeypatch.setattr(hub_module, "_list_files", list_files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_kwargs: str(half_a_download))
    words = r"2 of 4 files are missing \(consolidated\.02\.pth" if is_reachable else r"cannot reach the hub"
    with pytest.raises(ValueError, match=words):
        hub_module.download("meta-llama/Llama-2-70b")


def test_a_file_of_another_size_than_the_hub_s_is_named(monkeypatch, half_a_download):
    for name in FOUR_SHARDS:
        (half_a_download / name).write_bytes(b"abc" if name != "consolidated.03.pth" else b"a")
    monkeypatch.setattr(hub_module, "_list_files", lambda *_: (COMMIT, FOUR_SHARDS))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_kwargs: str(half_a_download))
    with pytest.raises(ValueError, match=r"consolidated\.03\.pth has 1 bytes, but 3 on the hub"):
        hub_module.download("meta-llama/Llama-2-70b")


def test_an_older_snapshot_is_neither_passed_off_as_the_listed_one_nor_damaged(monkeypatch, half_a_download):
    """The client returns one if it cannot ask for the revision again; a file of another size would be removed."""
    monkeypatch.setattr(hub_module, "_list_files", lambda *_: ("new", {"consolidated.00.pth": HubFile(5)}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_kwargs: str(half_a_download))
    with pytest.raises(ValueError, match=r"Llama-2-70b has changed during the download: run this again"):
        hub_module.download("meta-llama/Llama-2-70b")
    assert (half_a_download / "consolidated.00.pth").read_bytes() == b"abc"


def test_a_download_that_broke_off_is_refused_without_network_and_completed_with_it(hub, tmp_path):
    hub.withheld = {"consolidated.00.pth"}
    done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "check the network" in done.stderr
    hub.withheld = set()
    done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variable", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_complete_download_needs_no_network(hub, tmp_path, variable):
    online = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b")
    offline = download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b", **variable)
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == online.stdout
    (tmp_path / online.stdout.strip() / "consolidated.00.pth").unlink()
    assert download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b", **variable).returncode == 1


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    for _ in range(2):
        done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b", "--revision", "main")
        assert done.returncode == 0, done.stderr
    gets = Counter(hub.fetched())
    assert gets
    assert set(gets.values()) == {1}


REFUSED = {
    "gated, although listed": (("gated/listed",), ("is gated", "https://huggingface.co/gated/listed", "login")),
    "gated": (("gated/model",), ("accept its licence", "https://huggingface.co/gated/model", "HF_TOKEN", "login")),
    "private, or gated and not logged in": (("private/model",), ("private or gated", "`hf auth login`")),
    "a token that is no longer valid": (("stale-token/model",), ("does not accept the token (401)", "`hf auth login`")),
    "a token without the right": (("fine-grained/model",), ("may not read", "(403)", "settings/tokens")),
    "asked too often": (("busy/model",), ("(429)", "wait", "`hf auth login`")),
    "a hub with problems": (("broken/model",), ("(503)", "later")),
    "misspelt": (("meta-llama/Lama-2-7b",), ("meta-llama/Lama-2-7b was not found", "spelling")),
    "not a name": (("a/b/c",), ("not a repository name",)),
    "no such revision": (("meta-llama/Llama-2-7b", "--revision", "v9"), ("no revision 'v9'",)),
    "only pickles": (("old/pickles",), ("no original weights", "meta-llama/Llama-2-7b")),
    "only GGUF": (("tiny/GGUF",), ("no original weights", "tiny-Q8_0.gguf", "fetch one with --file")),
    "not the originals": (("meta-llama/Llama-2-7b-hf", "--format=meta"), ("no original weights",)),
    "not the safetensors": (("meta-llama/Llama-2-7b", "--format=hf"), ("no Hugging Face model", "config.json")),
    "another architecture": (("google/gemma-9",), ("google/gemma-9", "GemmaForCausalLM", "Qwen3ForCausalLM")),
    "experts": (("mistralai/experts",), ("cannot be converted, nothing more was fetched", "moe={'num_experts': 8}")),
    "only tekken": (("mistralai/tekken",), ("no tokenizer.model or tokenizer.json", "tekken.json is not read")),
    "not Mistral AI's": (("tiny/single", "--format=mistral"), ("no consolidated.safetensors with params.json",)),
    "no such file": (("tiny/GGUF", "--file=tiny-Q5_0.gguf"), ("no file tiny-Q5_0.gguf", "tiny-Q8_0.gguf")),
    "a part is missing": (("tiny/GGUF", "--file=half-00001-of-00002.gguf"), ("not all its parts",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_that_says_what_to_do(hub, tmp_path, case):
    arguments, words = REFUSED[case]
    done = download(tmp_path, hub.server_port, "--model_name", *arguments)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_without_network_the_line_says_so(tmp_path):
    done = download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "check the network" in done.stderr


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "options"), [("meta-llama/Llama-2-7b-hf", ()), ("meta-llama/Llama-3.2-1B", ("--format=hf",))]
)
def test_the_safetensors_come_with_what_belongs_to_them_and_without_other_forms(hub, tmp_path, name, options):
    done = llama_tp(tmp_path, hub.server_port, "download", name, *options)
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path / done.stdout.strip()) == HUGGING_FACE


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mistralai/both", (), set(HUGGING_FACE)),
        ("mistralai/both", ("--format=mistral",), {*MISTRAL, *TOKENIZER, "LICENSE.txt", "USE_POLICY.md"}),
        ("mistralai/own", (), set(MISTRAL)),
    ],
)
def test_of_two_forms_of_mistral_ais_models_one_is_fetched(hub, tmp_path, name, options, expected):
    done = llama_tp(tmp_path, hub.server_port, "download", name, *options)
    assert done.returncode == 0, done.stderr
    assert set(files_below(tmp_path / done.stdout.strip())) == expected


def test_weights_that_are_there_in_one_file_are_not_fetched_in_shards_as_well(hub, tmp_path):
    done = llama_tp(tmp_path, hub.server_port, "download", "tiny/single")
    assert done.returncode == 0, done.stderr
    names = set(files_below(tmp_path / done.stdout.strip()))
    assert {name for name in names if "safetensors" in name} == {"model.safetensors"}


def test_an_architecture_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    assert llama_tp(tmp_path, hub.server_port, "download", "google/gemma-9").returncode == 1
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"format": "gguf"}, r"format='gguf' must be one of auto, meta, hf, mistral"),
        ({"format": "hf", "file": "tiny.gguf"}, r"format=hf does not go with file=tiny\.gguf"),
        ({"file": "pytorch_model.bin"}, r"file='pytorch_model\.bin' must be the name of a \.gguf file"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_without_asking_the_hub(choice, words):
    with pytest.raises(ValueError, match=words):
        hub_module.download("tiny/GGUF", **choice)


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("tiny-Q8_0.gguf", ["tiny-Q8_0.gguf"]),
        ("F16/big-00002-of-00002.gguf", ["F16/big-00001-of-00002.gguf", "F16/big-00002-of-00002.gguf"]),
    ],
)
def test_one_gguf_file_is_fetched_with_all_its_parts_and_found_without_network(hub, tmp_path, file, names):
    command = ("download", "tiny/GGUF", "--file", file)
    done = llama_tp(tmp_path, hub.server_port, *command)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert str(path).endswith(names[0])
    snapshot = (tmp_path / path).parents[names[0].count("/")]
    assert files_below(snapshot) == {name: GGUF[name] for name in names}
    offline = llama_tp(tmp_path, 9, *command)
    assert (offline.returncode, offline.stdout) == (0, done.stdout), offline.stderr
    assert llama_tp(tmp_path, 9, "download", "tiny/GGUF", "--file=tiny-Q4_0.gguf").returncode == 1


def test_without_network_a_form_is_used_only_if_that_one_was_downloaded(hub, tmp_path):
    name = "meta-llama/Llama-3.2-1B"
    safetensors = llama_tp(tmp_path, hub.server_port, "download", name, "--format=hf")
    assert llama_tp(tmp_path, 9, "download", name).stdout == safetensors.stdout
    assert llama_tp(tmp_path, 9, "download", name, "--format=meta").returncode == 1
    originals = llama_tp(tmp_path, hub.server_port, "download", name)
    assert originals.stdout.strip() == f"{safetensors.stdout.strip()}/original"
    assert llama_tp(tmp_path, 9, "download", name).stdout == originals.stdout


def test_a_file_that_was_damaged_on_the_way_is_named_removed_and_fetched_again(hub, tmp_path):
    hub.damaged = {"consolidated.00.pth"}
    done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "consolidated.00.pth has sha256" in done.stderr
    assert "run this again" in done.stderr
    assert download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b").returncode == 1
    hub.damaged = set()
    done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.strip() / "consolidated.00.pth").read_bytes() == WEIGHTS
    assert hub.fetched().count("params.json") == 1


def test_a_file_is_hashed_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    hashed = []

    def hash_file(path, advance):
        hashed.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(record, "hash_file", hash_file)
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    listing = {"params.json": HubFile(2)}
    for name in ("one.pth", "two.pth"):
        (folder / name).write_bytes(name.encode())
        listing[name] = HubFile(7, hashlib.sha256(name.encode()).hexdigest())
    (folder / "params.json").write_bytes(b"{}")
    verified = record.verify_files(folder, listing, {})
    record.save_record(folder, "meta", record.Record(listing, "", verified))
    assert hashed == ["one.pth", "two.pth"]
    remembered = record.load_record(folder, "meta")
    assert remembered == record.Record(listing, "", verified)
    record.verify_files(folder, listing, remembered.verified)
    assert len(hashed) == 2
    (folder / "two.pth").write_bytes(b"two,pth")
    with pytest.raises(record.DamagedFile, match=r"two\.pth has sha256 .*, but .* on the hub"):
        record.verify_files(folder, listing, remembered.verified)
    assert hashed[2:] == ["two.pth"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1, "files": {"a": 1}, "verified": {}}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, content):
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (tmp_path / f".llama_tp.{COMMIT}.meta.json").write_text(content)
    assert record.load_record(folder, "meta") is None


@pytest.fixture
def published(tmp_path, hub, monkeypatch):
    """A tiny real model on the hub: its folder."""
    from tests.tiny_huggingface import (  # imports torch and transformers, which no other test here needs
        save,
        tiny_model,
    )
    from tests.tiny_text import make_tokenizer_json

    folder = save(tiny_model("llama"), tmp_path / "published")
    make_tokenizer_json(folder)
    monkeypatch.setitem(REPOSITORIES, "tiny/llama", files_below(folder) | DUPLICATES)
    return folder


def test_convert_downloads_a_model_of_the_hub_first(hub, tmp_path, published):
    done = llama_tp(tmp_path, hub.server_port, "convert", "tiny/llama@main", "converted", "--download_dir=from_hub")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "from_hub").is_dir()
    local = llama_tp(tmp_path, 9, "convert", str(published), "from_folder")
    assert local.returncode == 0, local.stderr
    assert files_below(tmp_path / "converted") == files_below(tmp_path / "from_folder")


def test_convert_says_that_it_looked_here_and_on_the_hub(hub, tmp_path):
    done = llama_tp(tmp_path, hub.server_port, "convert", "tiny/lama", "converted")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "there is no path tiny/lama here" in done.stderr
    assert "tiny/lama was not found: check the spelling" in done.stderr


@pytest.mark.parametrize(
    ("text", "hub_id"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", ("meta-llama/Llama-3.1-8B-Instruct", None)),
        ("owner/na.me_1@v2", ("owner/na.me_1", "v2")),
        ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
        *((text, None) for text in ("name", "a/b/c", "/a/b", "./b", "../b", "~/b", "a/b/", "a/", "a/b@", "a b/c")),
        *((text, None) for text in ("models/tiny.gguf", "models/consolidated.00.pth", "")),
    ],
)
def test_what_looks_like_a_name_on_the_hub(text, hub_id):
    assert hub_module.parse_hub_id(text) == hub_id
