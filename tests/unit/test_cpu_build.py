"""Kernels are compiled once for each machine, whatever the compiler, the disk, other processes and other users do."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import llama_tp
from llama_tp.model.cpu import build as build_module
from llama_tp.model.cpu import build_worker, library_cache, sources
from llama_tp.model.cpu.build import start_build
from llama_tp.model.cpu.build_worker import CompileError, Job, compiled
from llama_tp.model.cpu.compiler import NAMES, find_compilers
from llama_tp.model.cpu.library_cache import LibraryCache
from llama_tp.model.cpu.sources import Sources
from tests.e2e.programs import program
from tests.waiting import PATIENCE_S, SleepersClock, wait_until

FLAGS = ("-O1", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
HEADER = "int one(int);\n"
ONE = '#include "one.h"\nint one(int i) { return i > -1 ? VALUE : 0; }\n'
SUM = """#include <omp.h>
#include "one.h"
extern "C" int sum(int n) {
    int total = 0;
    #pragma omp parallel for reduction(+ : total) num_threads(2)
    for (int i = 0; i < n; i++) total += one(i) * (omp_get_num_threads() == 2);
    return total;
}
"""


PROGRAM = build_module._PROGRAM


@pytest.fixture(autouse=True)
def at_normal_priority(monkeypatch):
    """At a low one, a second of compiling takes a minute beside tests that use all cores."""
    monkeypatch.setattr(build_module, "_PROGRAM", f"import os; os.nice = lambda _: 0; {PROGRAM}")


@pytest.fixture(scope="module")
def real():
    """The path of a compiler that works."""
    return program(*NAMES, remedy="a C++ compiler is missing: apt install g++")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the libraries, which is created by the first build."""
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def files(tmp_path):
    for name, text in (("sum.cpp", SUM), ("one.cpp", ONE), ("one.h", HEADER)):
        (tmp_path / name).write_text(text)
    return [tmp_path / name for name in ("sum.cpp", "one.cpp", "one.h")]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a shell script the compiler. `$out` is the file to write."""

    def make(body, name="fake"):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\nfor word; do out=$word; done\necho $$ >> "$0.started"\n{body}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return make


def starts_of(compiler):
    """Process ids of the starts of a fake compiler."""
    log = compiler.with_name(f"{compiler.name}.started")
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_in(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def start(files, value=1, **options):
    return start_build(files, (*FLAGS, f"-DVALUE={value}"), **options)


def finished(build):
    """The library of a build that succeeds."""
    assert build.wait(PATIENCE_S), build.error
    assert build.error is None
    return build.library()


def answer(library):
    """Of a process of its own, so that a test may damage the file."""
    program = f"import ctypes; print(ctypes.CDLL({str(library)!r}).sum(10))"
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)


def key_of(files, flags=FLAGS):
    return Sources(tuple(files), tuple(flags)).key()


# What a build makes.


def test_units_and_headers_become_one_library_with_openmp(real, cache, files, fake):
    compiler = fake(f'{WAIT}exec {real} "$@"')
    build = start(files)
    assert build.library() is None
    compiler.with_name("fake.go").touch()
    library = finished(build)
    assert answer(library) == 10
    assert library.parent.parent == cache
    assert left_in(cache) == [library.parent.name]


def test_it_is_compiled_at_low_priority_and_is_the_first_to_go_if_memory_runs_out(cache, files, fake, monkeypatch):
    monkeypatch.setattr(build_module, "_PROGRAM", PROGRAM)
    compiler = fake(
        'nice > "$0.seen"; cat /proc/self/oom_score_adj >> "$0.seen"; cut -d " " -f 6 /proc/self/stat >> "$0.seen"\n'
        "exit 1"
    )
    assert start(files).wait(PATIENCE_S) is None
    # Linux applies a priority only within a session.
    assert compiler.with_name("fake.seen").read_text() == f"19\n1000\n{os.getsid(0)}\n"


def test_a_delayed_compiler_starts_later_and_never_if_it_is_closed_before(real, cache, files, fake):
    compiler = fake(f'exec {real} "$@"')
    begin = time.monotonic()
    finished(start(files, delay_s=0.5))
    assert time.monotonic() - begin >= 0.5
    never = start(files, value=2, delay_s=1000.0)
    process = never._process
    never.close()
    assert process.returncode == 1, "it ended by itself"
    assert len(starts_of(compiler)) == 1


def test_what_the_cache_has_is_there_at_once_and_starts_no_process(real, cache, files, monkeypatch):
    library = finished(start(files))

    def no_process(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    build = start(files)
    assert build.library() == library
    assert (build.wait(0), build.error) == (library, None)


def test_an_image_without_a_compiler_uses_a_library_in_its_cache(real, cache, files, monkeypatch, tmp_path):
    library = finished(start(files))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compilers() == []
    build = start(files)
    assert build.library() == library
    other = start(files, value=2)
    assert other.library() is None
    assert other.error == "there is no C++ compiler (c++, g++, clang++) on PATH; install g++, or set CXX"


def test_a_change_of_sources_headers_flags_cpu_or_version_is_another_library(files, monkeypatch):
    keys = [key_of(files)]
    for file in files:
        file.write_text(file.read_text() + "\n")
        keys.append(key_of(files))
    keys.append(key_of(files, (*FLAGS, "-g")))
    monkeypatch.setattr(sources, "cpu_identity", lambda: "another CPU")
    keys.append(key_of(files))
    monkeypatch.setattr(sources, "__version__", "99")
    keys.append(key_of(files))
    assert len(set(keys)) == len(keys)
    assert key_of(files) == keys[-1]


def test_the_cpu_is_known_by_its_model_and_instructions_but_not_by_its_clock(monkeypatch):
    from llama_tp.model.cpu import compiler

    def identity(text):
        monkeypatch.setattr(Path, "read_text", lambda _: text)
        return compiler.cpu_identity()

    text = "processor\t: 0\nmodel name\t: X\ncpu MHz\t: {}\nflags\t: fpu {}\n\n"
    assert identity(text.format(1000, "avx2")) == identity(text.format(2000, "avx2"))
    assert identity(text.format(1000, "avx2")) != identity(text.format(1000, "avx512f"))
    assert identity(text.format(1, "avx2") * 2) == identity(text.format(1, "avx2"))


def test_another_version_of_the_compiler_compiles_anew(real, cache, files, fake):
    compiler = fake(f'exec {real} "$@"')
    first = finished(start(files))
    fake(f'exec {real} "$@" # updated')
    assert finished(start(files)) != first
    assert len(starts_of(compiler)) == 2


def test_sources_that_change_while_they_are_compiled_give_no_library(real, cache, files, fake):
    fake(f'{real} "$@"; echo >> {files[2]}')
    build = start(files)
    assert build.wait(PATIENCE_S) is None
    assert "the sources were changed while they were compiled" in build.error
    assert left_in(cache) == []


def test_the_oldest_libraries_are_removed(cache, tmp_path):
    cache.mkdir(parents=True)
    store = LibraryCache(cache)
    names = [library_cache.entry_name(f"{number:032x}", "c") for number in range(12)]
    for age, name in enumerate(names):
        with store.staged("0a") as staged:
            (staged / library_cache.LIBRARY).write_bytes(b"x")
            store.install(staged, name, {"compiler": "c", "version": "1"})
        os.utime(cache / name, (age, age))
        if age > 0:
            assert store.find(f"{0:032x}", ["c"]), "that in use is kept"
    assert left_in(cache) == sorted([names[0], *names[-7:]])


# Compilers.


def test_cxx_may_have_arguments_and_is_the_only_one_tried(real, cache, files, fake, monkeypatch):
    compiler = fake(f'test "$1" = --mine && shift && exec {real} "$@"')
    monkeypatch.setenv("CXX", f"{compiler} --mine")
    assert answer(finished(start(files))) == 10
    assert len(starts_of(compiler)) == 1
    monkeypatch.setenv("CXX", "/no/such/compiler")
    build = start(files, value=2)
    assert (build.library(), build.error) == (None, "CXX=/no/such/compiler is not a program; correct or unset it")


def test_where_the_first_compiler_fails_the_next_one_is_used(real, cache, files, fake, monkeypatch, tmp_path):
    bad = fake("echo 'x.cpp:1:1: error: no omp.h'; exit 1", name="c++")
    good = fake(f'exec {real} "$@"', name="g++")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert answer(finished(start(files))) == 10
    assert [len(starts_of(one)) for one in (bad, good)] == [1, 1]
    assert start(files).library(), "the cache has it, though not from the first"


def test_names_of_one_file_are_one_compiler(fake, monkeypatch, tmp_path):
    compiler = fake("exit 1", name="g++")
    (tmp_path / "c++").symlink_to(compiler)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [one.command for one in find_compilers()] == [(str(tmp_path / "c++"),)]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "echo warning: x; echo 'a.cpp:3:7: error: no y'; echo more; exit 1",
            "failed with exit code 1: a.cpp:3:7: ",
        ),
        ("exit 4", "failed with exit code 4"),
        ("sleep 1000", "did nothing for 2 s and was ended"),
        ("sleep 1000 & exec >/dev/null 2>&1; wait", "did nothing for 2 s and was ended"),
        ("kill -SEGV $$", "was ended by SIGSEGV"),
        ("exit 0", "reported success, but wrote no library"),
        ("mkdir $out", "reported success, but wrote no library"),
        ("head -c 100000 /dev/urandom; head -c 100000 /dev/urandom >&2; exit 1", "failed with exit code 1"),
        ("echo nonsense > $out", "the compiled library failed with exit code 1: OSError: "),
        ("touch $out", "the compiled library failed with exit code 1: OSError: "),
        ('REAL "$@"; head -c 9000 $out > $out.half; mv $out.half $out', "the compiled library "),
        ('ulimit -f 1; REAL "$@"', "fake failed with exit code "),
        (
            "echo error: a.s: No space left on device; exit 1",
            "left on device; free some space, or set ",
        ),
    ],
)
def test_a_compiler_that_fails_is_one_line_and_leaves_nothing(real, cache, files, fake, body, words):
    compiler = fake(body.replace("REAL", real))
    build = start(files, timeout_s=2 if "sleep" in body else PATIENCE_S)
    assert build.wait(PATIENCE_S) is None
    assert words in build.error
    assert build.error.isprintable()
    assert len(build.error) < 600
    assert left_in(cache) == []
    assert len(starts_of(compiler)) == 1


def test_a_program_that_cannot_be_started_is_named(cache, files, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "text"))
    build = start(files)
    assert build.wait(PATIENCE_S) is None
    assert f"{tmp_path}/text cannot be started: Exec format error" in build.error


def test_a_missing_source_is_named(cache, files):
    build = start([*files, files[0].with_name("lost.cpp")])
    assert build.library() is None
    assert build.error == f"{files[0].with_name('lost.cpp')}: No such file or directory; install llama-tp again"


def test_a_compiler_that_gets_little_cpu_time_is_not_taken_for_one_that_hangs(tmp_path, monkeypatch):
    used = iter(range(1000))
    monkeypatch.setattr(build_worker, "_exit_if_alone", lambda: None)
    monkeypatch.setattr(build_worker, "_cpu_time", lambda _: next(used))
    monkeypatch.setattr(sys, "stdin", open(os.pipe()[0]))  # noqa: SIM115
    build_worker._run(["sleep", "1"], tmp_path, 0.2)
    monkeypatch.setattr(build_worker, "_cpu_time", lambda _: 7)
    with pytest.raises(CompileError, match=r"sleep did nothing for 0\.2 s"):
        build_worker._run(["sleep", "1000"], tmp_path, 0.2)


# Processes.


WAIT = 'while ! test -e "$0.go"; do sleep 0.05; done; '


def test_of_two_builds_at_once_one_compiles(real, cache, files, fake):
    compiler = fake(f'{WAIT}exec {real} "$@"')
    builds = [start(files), start(files)]
    assert wait_until(lambda: starts_of(compiler))
    time.sleep(0.5)
    assert [build.wait(0) for build in builds] == [None, None]
    compiler.with_name("fake.go").touch()
    libraries = {finished(build) for build in builds}
    assert len(libraries) == 1
    assert len(starts_of(compiler)) == 1


def test_a_compiler_that_hangs_holds_up_no_other_library(real, cache, files, fake):
    """One lock for the whole cache kept other CPUs and versions waiting for up to 15 minutes."""
    compiler = fake(f"{WAIT}exit 1")
    hanging = start(files, value=1)
    assert wait_until(lambda: starts_of(compiler))
    before = set(left_in(cache))
    assert len(before) == 2  # its folder and its lock
    fake(f'exec {real} "$@"', name="other")
    library = finished(start(files, value=2))
    assert set(left_in(cache)) == before | {library.parent.name}, "what the first one uses is kept"
    hanging.close()
    third = finished(start(files, value=3))
    assert left_in(cache) == sorted([library.parent.name, third.parent.name])


def test_what_a_killed_process_has_left_is_removed_by_the_next_one_of_any_library(real, cache, files, fake):
    compiler = fake(f"{WAIT}exit 1")
    first = start(files, value=1)
    assert wait_until(lambda: starts_of(compiler))
    first._process.kill()
    assert first.wait(PATIENCE_S) is None
    assert len(left_in(cache)) == 2  # its folder and its lock
    fake(f'exec {real} "$@"', name="other")
    library = finished(start(files, value=2))
    assert left_in(cache) == [library.parent.name]


def test_a_lock_that_another_process_has_just_removed_is_not_held(cache, monkeypatch):
    """Whoever took it would hold a lock that nobody else sees."""
    cache.mkdir(parents=True)
    store, lock, ends = LibraryCache(cache), library_cache.fcntl.flock, [cache / ".lock-0a"]

    def lock_late(handle, how):
        if ends:
            ends.pop().unlink()
        lock(handle, how)

    monkeypatch.setattr(library_cache.fcntl, "flock", lock_late)
    with store.locked("0a", 1.0, lambda: None), pytest.raises(TimeoutError):
        store.locked("0a", 0.0, lambda: None).__enter__()
    assert left_in(cache) == []


def test_if_the_process_that_compiles_is_killed_the_waiting_one_takes_over(real, cache, files, fake):
    compiler = fake(f'{WAIT}exec {real} "$@"')
    first = start(files)
    assert wait_until(lambda: starts_of(compiler))
    second = start(files)
    first._process.kill()
    assert first.wait(PATIENCE_S) is None
    assert "the process that compiles kernels was ended by SIGKILL" in first.error
    assert wait_until(lambda: len(starts_of(compiler)) == 2)
    assert wait_until(lambda: not is_running(starts_of(compiler)[0])), "its compiler runs on"
    compiler.with_name("fake.go").touch()
    library = finished(second)
    assert left_in(cache) == [library.parent.name], "what the killed one left is removed"


def test_the_compiler_dies_with_the_process_that_started_the_build(cache, files, fake, tmp_path):
    compiler = fake("sleep 1000 & echo $! > $0.child; touch $out; wait")
    program = (
        "import time; from pathlib import Path; from llama_tp.model.cpu.build import start_build; "
        f"build = start_build([Path({str(files[0])!r})], ['-shared']); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    assert wait_until(lambda: starts_of(compiler) and compiler.with_name("fake.child").exists())
    assert wait_until(lambda: compiler.with_name("fake.child").read_text())
    processes = [*starts_of(compiler), int(compiler.with_name("fake.child").read_text())]
    assert all(map(is_running, processes))
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(map(is_running, processes)))
    assert wait_until(lambda: left_in(cache) == [])


def test_a_process_that_does_not_react_keeps_nobody_waiting(cache, files, fake, monkeypatch):
    monkeypatch.setattr(build_module, "_CLOSE_S", 0.1)
    compiler = fake("exec sleep 1000")
    build = start(files)
    assert wait_until(lambda: starts_of(compiler))
    process = build._process
    process.send_signal(signal.SIGSTOP)
    build.close()
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert wait_until(lambda: not is_running(starts_of(compiler)[0]))


@pytest.mark.parametrize("end", [lambda build: build.close(), lambda build: build._process.terminate()])
def test_a_build_that_is_ended_leaves_neither_process_nor_file(cache, files, fake, monkeypatch, end):
    monkeypatch.setattr(build_module, "_CLOSE_S", PATIENCE_S)
    compiler = fake('touch $out "$TMPDIR/a.s"; echo $TMPDIR > "$0.tmp"; sleep 1000 & wait')
    build = start(files)
    assert wait_until(lambda: compiler.with_name("fake.tmp").exists())
    assert wait_until(lambda: compiler.with_name("fake.tmp").read_text())
    assert Path(compiler.with_name("fake.tmp").read_text().strip()).is_relative_to(cache)
    end(build)
    assert wait_until(lambda: not is_running(starts_of(compiler)[0]))
    assert wait_until(lambda: left_in(cache) == [])


def test_ctrl_c_is_left_to_the_parent(real, cache, files, fake):
    compiler = fake(f'{WAIT}exec {real} "$@"')
    build = start(files)
    assert wait_until(lambda: starts_of(compiler))
    build._process.send_signal(signal.SIGINT)
    compiler.with_name("fake.go").touch()
    finished(build)


def test_a_build_outlives_the_thread_that_started_it(real, cache, files, fake):
    """A signal at the parent's death would come when that thread ends."""
    compiler = fake(f'{WAIT}exec {real} "$@"')
    builds = []
    thread = threading.Thread(target=lambda: builds.append(start(files)))
    thread.start()
    thread.join()
    assert wait_until(lambda: starts_of(compiler))
    compiler.with_name("fake.go").touch()
    finished(builds[0])


# Damage, full disks, other users.


def test_a_damaged_library_is_compiled_anew(real, cache, files, fake):
    compiler = fake(f'exec {real} "$@"')
    library = finished(start(files))
    for number, damage in enumerate(
        (
            lambda: os.truncate(library, 5000),
            lambda: library.write_bytes(library.read_bytes()[:-1] + b"?"),
            lambda: library.unlink(),
            lambda: library.with_name("about.json").write_text("[]"),
            lambda: library.with_name("about.json").write_text("{"),
            lambda: library.with_name("about.json").unlink(),
        ),
        start=2,
    ):
        damage()
        assert finished(start(files)) == library
        assert len(starts_of(compiler)) == number
        assert answer(library) == 10


def test_a_library_that_cannot_be_loaded_is_compiled_anew_once(real, cache, files, fake):
    compiler = fake(f'exec {real} "$@"')
    build = start(files)
    library = finished(build)
    build.discard("no mapping")
    assert not library.exists()
    assert finished(build) == library
    assert len(starts_of(compiler)) == 2
    build.discard("no mapping")
    assert build.wait(0) is None
    assert build.error == f"{library} cannot be loaded: no mapping; set LLAMA_TP_CACHE to another folder"
    assert left_in(cache) == []


def test_a_disk_that_is_full_at_the_end_leaves_nothing(real, cache, files, monkeypatch):
    cache.mkdir(parents=True)
    monkeypatch.setattr(build_worker, "_exit_if_alone", lambda: None)
    monkeypatch.setattr(sys, "stdin", open(os.pipe()[0]))  # noqa: SIM115
    compilers = tuple((one.command, one.identity) for one in find_compilers())
    flags = (*FLAGS, "-DVALUE=1")
    job = Job(str(cache), key_of(files, flags), tuple(map(str, files)), flags, compilers, PATIENCE_S)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((Path, "write_text"), (os, "fsync"), (Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left on device"):
                compiled(job)
        assert left_in(cache) == []
    assert answer(compiled(job)) == 10


def test_where_nothing_can_be_kept_a_temporary_folder_is_used(real, files, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path / "file"))
    build = start(files)
    library = finished(build)
    assert answer(library) == 10
    (record,) = caplog.records
    assert record.getMessage() == (
        f"compiled kernels are not kept: {tmp_path}/file/kernels: Not a directory; set LLAMA_TP_CACHE to a folder of "
        "your own"
    )
    build.close()
    assert not library.parent.parent.exists()


def test_without_a_home_folder_a_temporary_one_is_used(real, cache, files, monkeypatch, caplog):
    monkeypatch.setattr(
        build_module, "user_folder", lambda: (_ for _ in ()).throw(ValueError("the user has no home folder"))
    )
    assert answer(finished(start(files))) == 10
    assert "compiled kernels are not kept: the user has no home folder;" in caplog.text


def owned_by_another(path, monkeypatch):
    """Root's files are everybody's to trust, so root gives it away; others pretend to be someone else."""
    if os.geteuid() == 0:
        os.chown(path, 4711, -1)
    else:
        monkeypatch.setattr(library_cache.os, "geteuid", lambda: 4711)


def writable_by_all(path, monkeypatch):
    path.chmod(0o777)


@pytest.mark.parametrize(
    ("expose", "words"),
    [(owned_by_another, "belongs to another user"), (writable_by_all, "other users may write to .*: chmod go-w it")],
)
def test_a_folder_that_another_user_can_write_is_not_used(real, cache, files, monkeypatch, caplog, expose, words):
    library = finished(start(files))
    expose(cache, monkeypatch)
    build = start(files)
    found = finished(build)
    assert not found.is_relative_to(cache)
    assert answer(found) == 10
    (record,) = caplog.records
    assert re.search(f"^compiled kernels are not kept: .*{words}; set LLAMA_TP_CACHE", record.getMessage())
    assert library.exists()


@pytest.mark.parametrize("expose", [owned_by_another, writable_by_all])
@pytest.mark.parametrize("name", ["", "kernels.so", "about.json"])
def test_an_entry_that_another_user_can_write_is_not_used(real, cache, files, monkeypatch, expose, name):
    library = finished(start(files))
    key = key_of(files, (*FLAGS, "-DVALUE=1"))
    identities = [one.identity for one in find_compilers()]
    assert LibraryCache(cache).find(key, identities) == library
    assert LibraryCache(cache).find(key, []) == library
    expose(library.parent / name, monkeypatch)
    assert LibraryCache(cache).find(key, identities) is None
    assert LibraryCache(cache).find(key, []) is None


def test_a_cache_on_a_file_system_without_locks_works(real, cache, files, monkeypatch):
    cache.mkdir(parents=True)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(library_cache.fcntl, "flock", no_locks)
    with LibraryCache(cache).staged("0a") as of_another, LibraryCache(cache).locked("0a", 1.0, lambda: None):
        assert of_another.exists(), "it may be in use"


def test_waiting_for_others_has_an_end(cache, monkeypatch):
    monkeypatch.setattr(library_cache, "time", SleepersClock())
    cache.mkdir(parents=True)
    store, calls = LibraryCache(cache), []
    waiting = store.locked("0a", 0.2, lambda: calls.append(1))
    with store.locked("0a", 1.0, lambda: None), pytest.raises(TimeoutError, match=r"compiling for 0\.2 s"):
        waiting.__enter__()
    assert calls


def test_libraries_are_listed_and_removed_by_the_command(real, run, cache, files):
    assert run("cache")[:2] == (0, "the cache is empty\n")
    libraries = [finished(start(files, value=value)).parent for value in (1, 2, 3)]
    record = libraries[1] / "about.json"
    record.write_text(record.read_text().replace(f'"version": "{llama_tp.__version__}"', '"version": "0.0.1"'))
    lines = dict(line.split("  ", 1) for line in run("cache")[1].splitlines())
    assert lines.keys() == {folder.name for folder in libraries}
    assert "MB  kernels compiled by /" in lines[libraries[0].name]
    assert [lines[folder.name].endswith("  (stale)") for folder in libraries] == [False, True, False]
    assert run("cache", "--remove=stale")[:2] == (0, f"removing {libraries[1]}\n")
    assert run("cache", "--remove=stale")[:2] == (0, "nothing to remove\n")
    assert run("cache", f"--remove={libraries[0].name}")[:2] == (0, f"removing {libraries[0]}\n")
    assert left_in(cache) == [libraries[2].name]
    code, _, err = run("cache", f"--remove={libraries[0].name}")
    assert (code, err.count("\n")) == (1, 1)
    assert run("cache", "--remove=all")[:2] == (0, f"removing {libraries[2]}\n")
    assert left_in(cache) == []
