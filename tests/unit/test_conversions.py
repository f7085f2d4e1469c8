"""The cache of conversions: each source once, again when it changes, never twice at the same time."""

from __future__ import annotations

import os
import threading

import pytest

from llama_tp.checkpoint import conversions
from llama_tp.checkpoint.conversions import ConversionOptions, converted, fingerprint
from llama_tp.checkpoint.verification import verify_checkpoint
from tests.tiny_converted import write_originals
from tests.waiting import wait_until

PLAIN = ConversionOptions()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


@pytest.fixture
def originals(tmp_path):
    return write_originals(tmp_path / "my model", num_shards=2)


@pytest.fixture
def counted(monkeypatch):
    """The sources that are converted."""
    from llama_tp.checkpoint import convert as module

    done, convert = [], module.convert

    def count(source, *args, **options):
        done.append(source)
        convert(source, *args, **options)

    monkeypatch.setattr(module, "convert", count)
    return done


def test_a_source_is_converted_once_and_again_only_after_a_change(cache, originals, counted, capsys):
    first = converted(originals, PLAIN)
    assert first.parent == cache
    assert first.name.startswith("my_model-")
    assert "files match the manifest" in verify_checkpoint(str(first))
    assert converted(originals, PLAIN) == first
    assert len(counted) == 1
    dense = converted(originals, ConversionOptions(quantize="none"))
    assert dense != first
    os.utime(originals / "params.json")
    changed = converted(originals, PLAIN)
    assert changed not in (first, dense)
    assert first.exists(), "a running server may need it"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "`llama-tp cache --remove=stale` frees" in captured.err


def test_what_a_fingerprint_depends_on(originals, tmp_path):
    (originals / ".cache").mkdir()
    before = fingerprint(originals, PLAIN)
    (originals / ".cache" / "note").write_text("of a download")
    assert fingerprint(originals, PLAIN) == before
    (originals / "extra.json").write_text("{}")
    after = fingerprint(originals, PLAIN)
    assert after != before
    (originals / "extra.json").unlink()
    assert fingerprint(originals, PLAIN) == before
    assert fingerprint(originals, ConversionOptions(tokenizer=str(originals / "tokenizer.model"))) != before
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    before = fingerprint(parts[0], PLAIN)
    parts[1].write_bytes(b"GGUF2")
    assert fingerprint(parts[0], PLAIN) != before


def test_a_conversion_that_fails_or_is_killed_leaves_no_entry(cache, originals, counted, monkeypatch):
    from llama_tp.checkpoint import convert as module

    convert = module.convert
    monkeypatch.setattr(module, "convert", lambda *_, **__: (_ for _ in ()).throw(ValueError("no space")))
    with pytest.raises(ValueError, match="no space"):
        converted(originals, PLAIN)
    assert conversions.conversions() == []
    monkeypatch.setattr(module, "convert", convert)
    folder = converted(originals, PLAIN)
    folder.with_name(f"{folder.name}.json").unlink()  # killed between the folder and its record
    assert converted(originals, PLAIN) == folder
    assert len(counted) == 2


def test_of_two_starts_at_once_one_converts_and_the_other_waits(cache, originals, monkeypatch, capsys):
    from llama_tp.checkpoint import convert as module

    calls, go, convert = [], threading.Event(), module.convert

    def slow(*args, **options):
        calls.append(args)
        assert go.wait(60)
        convert(*args, **options)

    monkeypatch.setattr(module, "convert", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(converted(originals, PLAIN))) for _ in range(2)]
    for thread in threads:
        thread.start()
    said = []
    assert wait_until(lambda: said.append(capsys.readouterr().err) or "Waiting for another" in "".join(said))
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert len(found) == 2
    assert found[0] == found[1]


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path, originals, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot keep the converted checkpoint in .*set LLAMA_TP_CACHE to a folder"):
        converted(originals, PLAIN)


def test_the_cache_is_listed_and_emptied_by_the_command(run, cache, originals):
    old = converted(originals, PLAIN)
    os.utime(originals / "params.json")
    new = converted(originals, PLAIN)
    code, out, _ = run("cache")
    assert code == 0
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert lines.keys() == {old.name, new.name}
    assert lines[old.name].endswith("(stale)")
    assert not lines[new.name].endswith("(stale)")
    assert run("cache", "--remove=stale")[:2] == (0, f"removing {old}\n")
    assert [one.folder for one in conversions.conversions()] == [new]
    code, _, err = run("cache", "--remove=nothing")
    assert (code, err.count("\n")) == (1, 1)
    assert run("cache", f"--remove={new.name}")[0] == 0
    assert not new.exists()


def test_the_cache_is_where_xdg_says_if_that_is_absolute(monkeypatch, tmp_path):
    from llama_tp.user_cache import cache_folder

    monkeypatch.delenv("LLAMA_TP_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llama_tp"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert str(cache_folder()) == "/home/alice/.cache/llama_tp"
