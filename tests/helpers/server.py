"""``bitforbit serve`` as a process of its own, for tests that ask it over HTTP, stop it or hurt it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

LEFT_SECONDS = 20
"""How long after the end of a server processes of it may be seen; they are dead before it, but for the kernel."""


@dataclass
class Served:
    """A server that answers."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        """All that it has written."""
        return self.log.read_text(errors="replace")

    def below(self) -> list[psutil.Process]:
        """Its processes, without ``bitforbit serve`` itself."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals, seconds: float = 60) -> int:
        """Send a signal to ``bitforbit serve`` alone, wait for its end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


def free_port() -> int:
    """A port that nobody uses, below those that the kernel gives to others meanwhile."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as free:
            port = random.randrange(15000, 32000)
            free.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def serving(
    directory: str,
    environment: Mapping[str, str],
    log: Path,
    options: Sequence[str] = (),
    program: Sequence[str] = ("-m", "bitforbit.cli"),
    seconds: float = 300,
) -> Iterator[Served]:
    """Start it, wait until it answers; at the end kill what is left. The log is in the error if it does not start."""
    port = free_port()
    command = [sys.executable, *program, "serve", directory, "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=output, start_new_session=True)
    served = Served(f"http://127.0.0.1:{port}", process, log)
    begin = time.monotonic()
    try:
        while not _answers(f"{served.url}/health"):
            assert process.poll() is None, served.text[-5000:]
            assert time.monotonic() < begin + seconds, served.text[-5000:]
            time.sleep(0.2)
        yield served
    finally:
        if process.poll() is None:
            for child in served.below():
                child.kill()
            process.kill()
            process.wait()


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    """None of these is left, not even for a moment longer than the kernel needs."""
    _, left = psutil.wait_procs(processes, timeout=LEFT_SECONDS)
    assert not left, [" ".join(process.cmdline()) for process in left]


def environment_with_source(**more: str) -> dict[str, str]:
    """This process's environment, in which child processes find the same bitforbit, and no network."""
    import bitforbit

    path = [str(Path(bitforbit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", **more}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
