"""The harness of scripts/gpu_check.py. What its sections do is tested in tests/distributed and tests/e2e."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.paths import SCRIPTS


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from gpu import report

    return report


@pytest.fixture
def results_in(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from gpu.child import results_in

    return results_in


def states(report):
    return {name: found["state"] for name, found in json.loads(report.path.read_text()).items()}


def test_a_section_that_raises_does_not_keep_the_others_from_running(harness, tmp_path):
    def broken(_):
        raise RuntimeError("no such kernel")

    report = harness.Report(tmp_path / "out.json", 60)
    harness.run_sections(report, [("broken", broken, 30), ("sound", lambda r: r.put("x", 1), 30)])
    assert states(report) == {"broken": "failed: RuntimeError: no such kernel", "sound": "ok"}
    assert not harness.summarize(report)


def test_a_wrong_result_and_a_failed_measurement_show_in_the_state(harness, tmp_path):
    def section(report):
        report.expect("right", True, 1)
        report.expect("equal", False, [1, 2])
        report.guard("quotient", lambda: 1 / 0)

    report = harness.Report(tmp_path / "out.json", 60)
    harness.run_sections(report, [("one", section, 30)])
    assert states(report) == {"one": "wrong: equal; errors: quotient"}
    assert report.data["one"]["quotient"] == {"error": "ZeroDivisionError: division by zero"}
    assert not harness.summarize(report)


def test_a_section_ends_when_its_time_is_up_whatever_it_catches(harness, tmp_path, monkeypatch):
    def endless(report):
        report.put("begun", True)
        while True:
            try:
                time.sleep(60)
            except Exception:
                continue

    monkeypatch.setattr(harness, "_LEAST_S", 0.0)
    report = harness.Report(tmp_path / "out.json", 60)
    harness.run_sections(report, [("endless", endless, 1.0), ("next", lambda r: r.put("x", 1), 30)])
    assert states(report) == {"endless": "ended after 1 s", "next": "ok"}
    assert report.data["endless"]["begun"] is True


def test_a_section_that_no_signal_reaches_is_left_behind_by_a_fresh_process(harness, tmp_path, monkeypatch):
    """A kernel that never ends: Python runs signal handlers between two of its own instructions only."""
    commands = []
    ended, end = os.pipe()

    def stuck(_):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # which would wake read
        try:
            ctypes.CDLL(None).read(ended, ctypes.create_string_buffer(1), 1)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    def begin_afresh(_, command):
        commands.append(command)
        os.write(end, b"x")

    monkeypatch.setattr(harness, "_LEAST_S", 0.0)
    monkeypatch.setattr(harness, "_HUNG_S", 0.0)
    monkeypatch.setattr(harness.os, "execv", begin_afresh)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--sections", "stuck,next", "--skip=x", "--budget", "60"])
    report = harness.Report(tmp_path / "out.json", 60)
    sections = [("stuck", stuck, 0.9), ("next", lambda r: r.put("x", 1), 30)]
    harness.run_sections(report, sections)
    program, *options = commands[0][2:]
    assert Path(program) == SCRIPTS / "gpu_check.py"
    assert options[:-1] == ["--budget", "60", "--sections", "next", "--used"]


def test_a_section_for_which_no_time_is_left_is_skipped(harness, tmp_path):
    report = harness.Report(tmp_path / "out.json", 1)
    harness.run_sections(report, [("late", lambda r: r.put("x", 1), 30)])
    assert report.data["late"] == {"skipped": "no time left", "state": "no time left"}
    assert report.section == "", "the thread that watches for hangs would take it for one"


def test_results_of_two_ranks_in_one_line_are_both_read(results_in):
    line = 'note RESULT ["rank 0", {"heard": "RESULT of it"}]RESULT ["rank 1", null] and more'
    assert list(results_in(line)) == [("rank 0", {"heard": "RESULT of it"}), ("rank 1", None)]


@pytest.mark.parametrize("line", ["RESULT ", 'RESULT ["half", {"a": 1', "RESULT 5", "RESULT [1]", "no result"])
def test_what_is_no_result_is_passed_over(results_in, line):
    assert list(results_in(line)) == []


def test_an_unknown_section_is_refused_with_those_that_there_are(tmp_path):
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--cpu-smoke", "--sections", "env,atention"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no section 'atention'; there are env, correct, " in done.stderr
