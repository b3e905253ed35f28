"""What becomes of a server's processes, with small programs in the place of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from helpers.server import assert_gone, environment_with_source

SUPERVISE = """
import sys
from bitforbit.cli import supervise
from bitforbit.errors import ServerError
supervise.STOP_SECONDS, supervise._FAREWELL_SECONDS, supervise._PHASE_SECONDS = 2.0, 1.0, 0.3
supervise._SCAN_SECONDS = 0.1
try:
    sys.exit(supervise.supervise([sys.argv[1]], {"FAKE": sys.argv[2]}, sys.executable + " " + sys.argv[3]))
except ServerError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(3)
"""

# Starts a worker, which starts a process that does not listen to SIGTERM; then does what FAKE says.
SERVER = """
import os, pathlib, signal, subprocess, sys, time
root = pathlib.Path(__file__).parent
subprocess.Popen([sys.executable, root / "worker.py"])
while not (root / "ready").exists():
    time.sleep(0.01)
what = os.environ["FAKE"]
if what == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what == "polite":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(root / "up").touch()
if what.startswith("exit"):
    sys.exit(int(what.removeprefix("exit")))
while True:
    time.sleep(60)
"""
WORKER = """
import pathlib, signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
stubborn = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
stubborn.stdout.readline()
(pathlib.Path(__file__).parent / "ready").touch()
time.sleep(600)
"""


@dataclass
class Fake:
    """A fake server under supervision; ``below``: its processes, the server, the worker, the stubborn one."""

    process: subprocess.Popen[str]
    below: list[psutil.Process]

    def end(self) -> tuple[int, str]:
        """The exit code and what was written to standard error; nothing may be left."""
        _, errors = self.process.communicate(timeout=60)
        assert_gone(self.below)
        return self.process.returncode, errors


Start = Callable[[str], Fake]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes = []

    def run(what: str) -> Fake:
        (tmp_path / "server.py").write_text(SERVER)
        (tmp_path / "worker.py").write_text(WORKER)
        command = [sys.executable, "-c", SUPERVISE, tmp_path / "server.py", what, tmp_path / "worker.py"]
        process = subprocess.Popen(command, env=environment_with_source(), stderr=subprocess.PIPE, text=True)
        processes.append(process)
        while not (tmp_path / "up").exists():
            assert process.poll() is None
            time.sleep(0.01)
        me = psutil.Process(process.pid)
        if not what.startswith("exit"):
            while len(me.children(recursive=True)) < 3:
                time.sleep(0.01)
            time.sleep(0.5)  # by then the worker is watched
        return Fake(process, sorted(me.children(recursive=True), key=lambda p: p.pid))

    yield run
    for process in processes:
        process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_asked_to_stop(start: Start, number: signal.Signals, code: int) -> None:
    fake = start("polite")
    fake.process.send_signal(number)
    assert fake.end() == (code, "")


def test_a_deaf_server_is_killed_in_the_end(start: Start) -> None:
    fake = start("deaf")
    fake.process.send_signal(signal.SIGTERM)
    code, errors = fake.end()
    assert code == 0
    assert "the server had not stopped after 2 s and was killed" in errors


def test_a_second_ctrl_c_kills(start: Start) -> None:
    fake = start("deaf")
    fake.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    fake.process.send_signal(signal.SIGINT)
    assert fake.end()[0] == 130


def test_a_worker_dies(start: Start) -> None:
    fake = start("polite")
    worker = next(p for p in fake.below if p.cmdline()[-1].endswith("worker.py"))
    worker.kill()
    code, errors = fake.end()
    assert code == 3
    (line,) = errors.splitlines()
    assert f"worker.py (process {worker.pid}) " in line
    assert "nothing of the server is left running" in line


def test_the_server_dies_before_its_workers(start: Start) -> None:
    fake = start("polite")
    fake.below[0].kill()
    code, errors = fake.end()
    assert code == 3
    assert f"the server (process {fake.below[0].pid}) was killed by SIGKILL (the kernel sends it when" in errors


@pytest.mark.parametrize(("status", "code"), [(0, 0), (7, 3)])
def test_the_server_ends_by_itself(start: Start, status: int, code: int) -> None:
    got, errors = start(f"exit{status}").end()
    assert got == code
    assert ("ended with status 7" in errors) == bool(status)


def test_whoever_watches_is_killed(start: Start) -> None:
    fake = start("polite")
    fake.process.kill()
    # Nobody is left to see to the others; the server is asked to end, and a real one ends its workers.
    assert_gone(fake.below[:1])
    for process in fake.below[1:]:
        process.kill()


def test_an_ignored_signal_stays_ignored(start: Start) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fake = start("polite")
    finally:
        signal.signal(signal.SIGHUP, before)
    os.kill(fake.process.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert fake.process.poll() is None
    fake.process.send_signal(signal.SIGTERM)
    assert fake.end()[0] == 0
