"""A server as a child process: signals are passed on, what dies is named, and nothing is left running.

Servers are made of several processes. If one of vLLM's dies, what is left may go on for a while, answer errors, end
with status 0, or stay behind; and a server whose parent is killed does not notice. So this process stays beside it,
adopts what becomes an orphan below it, and is woken by the kernel the moment a process of the server ends.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bitforbit.errors import ServerError

STOP_SECONDS = 30.0
"""How long a server may take to end what it is doing, once it was asked to stop."""

_FAREWELL_SECONDS = 10.0
"""How long the rest of a server may take to say what it knows after one of its processes died."""

_PHASE_SECONDS = 3.0
_SCAN_SECONDS = 1.0
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def supervise(arguments: Sequence[str], environment: Mapping[str, str], watched: str = "") -> int:
    """Run Python with these arguments until it ends or is asked to stop; afterwards nothing below it is left.

    ``watched``: what the names of those processes below it begin with that live as long as the server does. The main
    thread's signal handlers are this function's meanwhile: SIGINT, SIGTERM and SIGHUP are passed on to the server; a
    second one, or ``STOP_SECONDS``, kill it.

    Returns the exit code: 0, or 130 after SIGINT. Raises ServerError if the server or a process of it ended otherwise.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with _signals() as wakeup:
        server = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            process_group=0,  # so that Ctrl-C of a terminal reaches it once, through here
            preexec_fn=_end_with_parent,
        )
        return _Watch(server, watched, wakeup).run()


class _Watch:
    """One server and the processes below it."""

    def __init__(self, server: subprocess.Popen[bytes], prefix: str, wakeup: socket.socket) -> None:
        self._server = server
        self._prefix = prefix
        self._wakeup = wakeup
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._seen: set[int] = set()
        self._dead: str | None = None
        """The process that ended first."""
        self._asked: int | None = None
        """The signal that asked for the end."""
        self._deadline = float("inf")

    def run(self) -> int:
        """See :func:`supervise`."""
        try:
            while self._server.poll() is None and time.monotonic() < self._deadline:
                self._look()
                self._wait(min(_SCAN_SECONDS, max(0.0, self._deadline - time.monotonic())))
        finally:
            late = self._server.poll() is None
            code = self._end_server()
            _end(_below())
            self._selector.close()
        if self._asked is not None:
            if late:
                print(f"the server had not stopped after {STOP_SECONDS:.0f} s and was killed", file=sys.stderr)
            return 128 + signal.SIGINT if self._asked == signal.SIGINT else 0
        if self._dead is None:
            if code == 0:
                return 0
            self._dead = f"the server (process {self._server.pid}) {_how(code)}"
        raise ServerError(
            f"{self._dead}; nothing of the server is left running. What it said is above; start it again when the "
            "cause is gone"
        )

    def _end_server(self) -> int:
        if self._asked is None and self._server.poll() is None:
            self._server.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(_PHASE_SECONDS)
        self._server.kill()  # does nothing where it has ended
        return self._server.wait()

    def _look(self) -> None:
        """Find the processes that are to be watched from now on; bury adopted ones."""
        import psutil

        for process in _below():
            if process.pid in self._seen or process.pid == self._server.pid:
                continue
            with suppress(psutil.Error, OSError):  # it may have ended meanwhile
                if process.status() == psutil.STATUS_ZOMBIE and process.ppid() == os.getpid():
                    process.wait(0)
                name = " ".join(process.cmdline()).strip()  # its title, where it has set one
                if self._prefix and name.startswith(self._prefix):
                    handle = os.pidfd_open(process.pid)
                    self._selector.register(handle, selectors.EVENT_READ, (process.pid, name))
                    self._seen.add(process.pid)

    def _wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._wakeup:
                for number in self._wakeup.recv(64):
                    self._note_signal(number)
            else:
                pid, name = key.data
                self._note_death(pid, name)
                self._selector.unregister(key.fileobj)
                os.close(key.fd)

    def _note_signal(self, number: int) -> None:
        if number not in _STOPS:
            return
        if self._asked is not None:
            self._deadline = 0.0
            return
        self._asked = number
        self._deadline = time.monotonic() + STOP_SECONDS
        self._server.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _note_death(self, pid: int, name: str) -> None:
        if self._asked is not None or self._dead is not None:
            return
        code = _exit_code(pid)
        self._dead = f"{name} (process {pid}) {_how(code)}"
        self._deadline = time.monotonic() + _FAREWELL_SECONDS


def _below() -> list[Any]:
    """The processes below this one."""
    import psutil

    processes: list[Any] = psutil.Process().children(recursive=True)
    return processes


def _end(processes: list[Any]) -> None:
    """Wait for processes a moment, ask, then kill.

    Those that free what others shared (multiprocessing's resource trackers) end by themselves, after the others.
    """
    import psutil

    def is_tracker(process: Any) -> bool:
        with suppress(psutil.Error):
            return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
        return False

    trackers = [process for process in processes if is_tracker(process)]
    others = [process for process in processes if process not in trackers]
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        _send(others, number)
        _, others = psutil.wait_procs(others, timeout=_PHASE_SECONDS)
    _, trackers = psutil.wait_procs(trackers, timeout=_PHASE_SECONDS)
    _send(trackers, signal.SIGKILL)


def _send(processes: list[Any], number: signal.Signals | None) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            if number is not None:
                process.send_signal(number)


def _exit_code(pid: int) -> int | None:
    """How a process ended that its parent has not asked about yet, as ``Popen.returncode``; None if it is too late."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[-1])) if state == "Z" else None


def _how(code: int | None) -> str:
    if code is None:
        return "ended (if by SIGKILL, memory may have run out: dmesg tells)"
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL (the kernel sends it when memory runs out: dmesg tells)"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that receives the numbers of signals while the handlers of the main thread do nothing."""
    numbers = (*_STOPS, signal.SIGCHLD)
    wakeup, inner = socket.socketpair()
    with wakeup, inner:
        inner.setblocking(False)
        # One that is ignored, as under nohup, stays so.
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in numbers
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN
        }
        before_fd = signal.set_wakeup_fd(inner.fileno())
        try:
            yield wakeup
        finally:
            signal.set_wakeup_fd(before_fd)
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
