"""Whatever lies in a folder: nothing in it is executed, and a refusal is one line, at once, in little memory."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager

import pytest
import torch

from llama_tp.checkpoint.convert import MODEL_ARGS, convert
from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.inspection import inspect_checkpoint
from llama_tp.checkpoint.store.manifest import MANIFEST, write_manifest
from llama_tp.checkpoint.store.table import TABLE
from llama_tp.model_args import ModelArgs
from llama_tp.text import load_tokenizer
from llama_tp.text.tokenizer_files import check_links
from tests.paths import ROOT
from tests.tiny_checkpoint import Evil, meta_tensors, write_meta
from tests.tiny_converted import convert_beside, write_originals
from tests.tiny_gguf import write_gguf
from tests.tiny_huggingface import save, tiny_model
from tests.tiny_mistral import write_mistral
from tests.tiny_text import make_sentencepiece_model, make_tokenizer_json

SECONDS = 5.0
GROWTH = 300 << 20
"""Bytes that the process may grow by. Files of up to 64 MiB are parsed."""
SPARSE = 1 << 40
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def meta(tmp_path):
    folder = write_meta(tmp_path / "meta", meta_tensors())
    make_sentencepiece_model(folder)
    return folder


@pytest.fixture
def hf(tmp_path):
    folder = save(tiny_model("llama"), tmp_path / "hf")
    make_tokenizer_json(folder)
    return folder


@pytest.fixture
def mistral(tmp_path):
    folder = write_mistral(tmp_path / "mistral", tiny_model("mistral"))
    make_sentencepiece_model(folder)
    return folder


@contextmanager
def refused(*words):
    """One line, at once, in little memory."""
    start, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError)) as error:
        yield
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 1000
    assert "weights_only" not in message.replace("weights_only=True", "")
    assert time.thread_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH


def open_all(folder):
    """Everything that `convert` opens, and `inspect`."""
    reader = open_checkpoint(folder)
    if folder.is_dir():
        check_links(folder)
        load_tokenizer(folder, embedding_rows=reader.args.vocab_size)
    return reader


def repack(path, pickled, *, compress=False):
    """A .pth with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name, pickled if name.lower().endswith("data.pkl") and pickled is not None else data)


def with_global(name, *, key=b"X\x01\x00\x00\x00a"):
    """{"a": name(2**30)}, where name is `module\\nattribute`."""
    return b"\x80\x02}" + key + b"c" + name + b"\n" + b"J\x00\x00\x00\x40\x85Rs."


def tuples_of_tuples(put=b"q"):
    """A dict with one key, whose hash takes 2**60 steps."""
    data = b"\x80\x02})q\x01"
    for level in range(1, 61):
        data += b"h" + bytes([level]) + b"\x86" + put + bytes([level + 1])
    return data + b"K\x01s."


PICKLES = {
    "a command": (with_global(b"os\nsystem"), ("is refused, nothing in it was executed", "it needs os.system")),
    "a builtin": (with_global(b"builtins\neval"), ("nothing in it was executed", "builtins.eval")),
    "a gigabyte": (with_global(b"builtins\nbytearray"), ("nothing in it was executed", "builtins.bytearray")),
    "a numpy array": (with_global(b"numpy.core.multiarray\n_reconstruct"), ("numpy.core.multiarray._reconstruct",)),
    "a code object": (with_global(b"types\nCodeType"), ("types.CodeType",)),
    "an endless hash": (tuples_of_tuples(), ("nothing in it was executed", "it nests tuples")),
    "an endless hash, remembered twice": (tuples_of_tuples(b"q\xffq"), ("it nests tuples",)),
    "17 MB of list": (b"\x80\x02(" + b"N" * (17 << 20) + b"l.", ("list of tensors has more than 16777216 bytes",)),
    "a length beyond the end": (b"\x80\x02X\xff\xff\xff\x7fa.", ("truncated or corrupt",)),
    "no pickle": (b"\xff" * 100, ("truncated or corrupt",)),
}


@pytest.mark.parametrize("case", PICKLES)
def test_the_pickle_in_a_pth(meta, case):
    pickled, words = PICKLES[case]
    repack(meta / "consolidated.00.pth", pickled)
    with refused("consolidated.00.pth ", *words):
        open_all(meta)


def test_a_pickle_under_a_name_that_torch_takes_for_the_usual_one(meta):
    path = meta / "consolidated.00.pth"
    path.write_bytes(path.read_bytes().replace(b"/data.pkl", b"/DATA.PKL"))
    FairscaleReader(meta)
    repack(path, with_global(b"builtins\nbytearray"))
    with refused("builtins.bytearray"):
        open_all(meta)


def test_a_compressed_pth(meta):
    """Of which a few bytes can become any number."""
    repack(meta / "consolidated.00.pth", b"\0" * (1 << 28), compress=True)
    with refused("consolidated.00.pth has compressed entries"):
        open_all(meta)


def test_a_tensor_that_is_larger_than_its_bytes(meta):
    path = meta / "consolidated.00.pth"
    shard = torch.load(path, weights_only=True)
    torch.save({**shard, "norm.weight": torch.ones(1, dtype=torch.bfloat16).expand(1 << 40)}, path)
    with refused("norm.weight claims 2199023255552 bytes, more than the file holds"):
        open_all(meta)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.01.pth"])
def test_an_object_in_place_of_a_tensor(meta, tmp_path, name, legacy):
    torch.save({"norm.weight": Evil(tmp_path / "proof")}, meta / name, _use_new_zipfile_serialization=not legacy)
    with refused(name, "torch before 1.6" if legacy else "nothing in it was executed"):
        open_all(meta)
    assert not (tmp_path / "proof").exists()


def test_names_of_tensors_cannot_forge_lines(meta):
    path = meta / "consolidated.00.pth"
    shard = torch.load(path, weights_only=True)
    for name in ("a\n[METRICS]x", "\x1b[31mred", "x" * 100_000):
        torch.save({**shard, name: shard["norm.weight"]}, path)
        with refused("1 tensor(s) unexpected"):
            open_all(meta)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, "params.json", *OPTIONAL])
@pytest.mark.parametrize("content", ["pickle", "deep", "deep objects", "huge", "a pipe", "digits"])
def test_json(hf, mistral, tmp_path, name, content):
    folder = mistral if name == "params.json" else hf
    if name.startswith("model."):
        (hf / "model.safetensors").unlink()
    path = folder / name
    path.unlink(missing_ok=True)
    if content == "a pipe":
        os.mkfifo(path)
        if name in OPTIONAL:  # it is as if it were not there: opening it would wait for ever
            open_all(folder)
            return
        with refused(str(folder)):
            open_all(folder)
        return
    if content == "huge":
        path.touch()
        os.truncate(path, SPARSE)
    else:
        path.write_bytes(
            {
                "pickle": pickle.dumps(Evil(tmp_path / "proof")),
                "deep": b"[" * 1_000_000,
                "deep objects": b'{"a":' * 1_000_000,
                "digits": b'{"a": ' + b"9" * 10_000 + b"}",
            }[content]
        )
    with refused(name):
        open_all(folder)
    assert not (tmp_path / "proof").exists()


SIZES = {
    "meta": ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "norm_eps"),
    "hf": (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
        *("intermediate_size", "rms_norm_eps"),
    ),
    "mistral": ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "rope_theta"),
}
NO_SIZES = (10**4000, 10**40, 2**31, -1, 1e999, float("nan"), [], {}, "9" * 5000, True)


@pytest.mark.parametrize("value", NO_SIZES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("kind", SIZES)
def test_sizes_in_json(request, kind, value):
    """None of them makes names, tensors or arithmetic of that size."""
    folder = request.getfixturevalue(kind)
    path = folder / ("config.json" if kind == "hf" else "params.json")
    config = json.loads(path.read_text())
    for key in SIZES[kind]:
        if not is_fine(key, value):
            path.write_text(json.dumps({**config, key: value}))
            with refused(path.name):
                open_checkpoint(folder)


def is_fine(key, value):
    """A number that is no size may be as large."""
    return key in ("norm_eps", "rms_norm_eps", "rope_theta") and value == 2**31


def test_code_beside_a_model_is_not_imported(hf, tmp_path):
    """Nor files that transformers would run with trust_remote_code, nor pickles beside safetensors."""
    evil = f"open({str(tmp_path / 'proof')!r}, 'w')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py"):
        (hf / name).write_text(evil)
    config = json.loads((hf / "config.json").read_text())
    auto = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (hf / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
    words = json.loads((hf / "tokenizer_config.json").read_text())
    auto = {"AutoTokenizer": ["tokenization_evil.T", None]}
    (hf / "tokenizer_config.json").write_text(json.dumps({**words, "auto_map": auto, "tokenizer_class": "T"}))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (hf / name).write_bytes(pickle.dumps(Evil(tmp_path / "proof")))
    out = tmp_path / "out"
    convert(str(hf), None, None, str(out), model_args_path=str(out / MODEL_ARGS))
    assert not (tmp_path / "proof").exists()
    assert not [path.name for path in out.iterdir() if path.suffix in (".py", ".bin", ".pt")]


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", ["pickle", "huge", "a claimed length", "a page"])
def test_tokenizers(hf, mistral, tmp_path, name, content):
    folder = hf if name == "tokenizer.json" else mistral
    path = folder / name
    data = {
        "pickle": pickle.dumps(Evil(tmp_path / "proof")),
        "huge": b"",
        "a claimed length": b"\n" + b"\xff" * 9 + b"\x01",
        "a page": b"<!DOCTYPE html>",
    }[content]
    path.write_bytes(data)
    if content == "huge":
        os.truncate(path, SPARSE)
    with refused(name):
        open_all(folder)
    assert not (tmp_path / "proof").exists()


def safetensors_header(length, text=b"{}"):
    return struct.pack("<Q", length) + text


SAFETENSORS = {
    "a length of 2**60": safetensors_header(1 << 60),
    "a length of 2**63": safetensors_header(1 << 63),
    "a length of 99 MB": safetensors_header(99 << 20),
    "deep JSON": safetensors_header(1_000_000, b"[" * 1_000_000),
    "offsets beyond the end": safetensors_header(
        60, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,9999999]}}'.ljust(60)
    ),
    "a shape that overflows": safetensors_header(
        90, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'.ljust(90)
    ),
    "a pickle": pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("case", SAFETENSORS)
@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors"])
def test_safetensors(hf, mistral, name, case):
    folder = hf if name.startswith("model") else mistral
    (folder / name).write_bytes(SAFETENSORS[case])
    with refused(name):
        open_all(folder)


def test_gguf_metadata_is_neither_run_nor_believed(tmp_path):
    """Headers that lie are in test_gguf.py."""
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    write_gguf(tmp_path / "a.gguf", general__name=evil, general__source__url="file:///etc/passwd")
    assert GGUFReader(tmp_path / "a.gguf").args.n_layers == 1
    write_gguf(tmp_path / "b.gguf", general__alignment=0)
    with refused("b.gguf"):
        GGUFReader(tmp_path / "b.gguf")
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + pickle.dumps(Evil(tmp_path / "proof")))
    with refused("c.gguf"):
        GGUFReader(tmp_path / "c.gguf")
    assert not (tmp_path / "proof").exists()


LINKED = {
    "meta": ("params.json", "consolidated.00.pth", "tokenizer.model", "checklist.chk"),
    "hf": ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    "mistral": ("params.json", "consolidated.safetensors", "tokenizer.model", "generation_config.json"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in LINKED.items() for name in names])
def test_links_that_leave_the_folder(request, tmp_path, kind, name):
    """A template that is a link to a private key would be copied into the checkpoint, and shown to every user."""
    folder = request.getfixturevalue(kind)
    path, elsewhere = folder / name, tmp_path / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.write_text(f"{'0' * 32}  other.bin\n" if name.endswith(".chk") else "{}")
    path.symlink_to(elsewhere)
    with refused(f"{path} is a link that leaves the folder"):
        open_all(folder)
    path.unlink()
    elsewhere.rename(folder / "inside")
    path.symlink_to("inside")
    open_all(folder)
    path.unlink()
    path.symlink_to(name)
    if kind == "mistral" and name == "params.json":
        with refused(str(path)):
            open_all(folder)


def test_convert_copies_no_link_that_leaves_the_folder(hf, tmp_path):
    (tmp_path / "key").write_text("a private key")
    (hf / "chat_template.jinja").symlink_to(tmp_path / "key")
    out = tmp_path / "out"
    for tokenizer in (None, str(hf), str(hf / "tokenizer.json")):
        with refused("chat_template.jinja is a link that leaves the folder"):
            convert(str(hf), tokenizer, None, str(out), model_args_path=str(out / MODEL_ARGS))
    (hf / "chat_template.jinja").unlink()
    (tmp_path / "named.json").symlink_to(hf / "tokenizer.json")  # said by the user, and not by a file
    convert(str(hf), str(tmp_path / "named.json"), None, str(out), model_args_path=str(out / MODEL_ARGS))
    assert (out / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_a_pipe_in_place_of_a_shard(meta):
    path = meta / "consolidated.00.pth"
    path.unlink()
    os.mkfifo(path)
    with refused("consolidated.00.pth is not a regular file"):
        FairscaleReader(meta)


@pytest.fixture
def checkpoint(tmp_path):
    return convert_beside(write_originals(tmp_path / "originals"))


@pytest.mark.parametrize("name", [TABLE, MANIFEST, MODEL_ARGS])
@pytest.mark.parametrize("content", ["pickle", "deep"])
def test_the_served_form(checkpoint, tmp_path, name, content):
    """Also where the manifest lists the file as it is: whoever makes the one makes the other. What is pickled in other
    files is never unpickled (test_dcp.py)."""
    data = {"pickle": pickle.dumps(Evil(tmp_path / "proof")), "deep": b"[" * 1_000_000}[content]
    (checkpoint / name).write_bytes(data)
    if name != MANIFEST:
        write_manifest(checkpoint)
    with refused(str(checkpoint)):
        reader = inspect_checkpoint(checkpoint) and open_served(checkpoint)
        reader.tensors["norm.weight"].read(0, 0, 64)
    assert not (tmp_path / "proof").exists()


def open_served(folder):
    from llama_tp.checkpoint.store.stored import StoredReader

    return StoredReader(folder)


@pytest.mark.parametrize("value", [10**40, 10**400, 2**31, -1, 1e999])
def test_sizes_in_model_args(checkpoint, value):
    args = json.loads((checkpoint / MODEL_ARGS).read_text())
    for key in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len", "norm_eps", "rope_theta"):
        if not is_fine(key, value):
            (checkpoint / MODEL_ARGS).write_text(json.dumps({**args, key: value}))
            with refused(MODEL_ARGS):
                ModelArgs.load_converted(checkpoint / MODEL_ARGS)


def test_the_commands_print_one_line_and_no_traceback(hf, meta):
    (hf / "config.json").write_bytes(b"[" * 1_000_000)
    repack(meta / "consolidated.00.pth", with_global(b"os\nsystem"))
    for folder in (hf, meta):
        command = [sys.executable, "-m", "llama_tp", "inspect", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
