"""``bitforbit compress --shards`` and ``--merge`` in processes of their own, which are killed and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_models import digests, one_object, write_model

from bitforbit.cli import main
from helpers.models import build_model

Worker = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough files that a worker can be caught in the middle."""
    return build_model(tmp_path_factory.mktemp("large") / "model", shards=40, dim=256)


@pytest.fixture(scope="module")
def expected(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    dst = tmp_path_factory.mktemp("expected") / "c"
    assert main(["compress", str(large), str(dst), "--json"]) == 0
    return digests(dst)


def caught(src: Path, dst: Path, shards: str) -> Worker:
    """A worker, stopped by a signal after its first file and before its last."""
    command = [sys.executable, "-m", "bitforbit.cli", "compress", src, dst, "--shards", shards, "--threads", "1"]
    for _ in range(10):
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        done = len(list(dst.parent.glob("*/*/done/*")))
        while worker.poll() is None:
            if len(list(dst.parent.glob("*/*/done/*"))) > done:
                worker.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                if worker.poll() is None:
                    return worker
                break
            time.sleep(0.001)
        worker.communicate()
        assert worker.returncode == 0
    pytest.fail("no worker could be caught")


def finish(worker: Worker, signals: list[signal.Signals]) -> tuple[int, str]:
    for number in signals:
        worker.send_signal(number)
    _, errors = worker.communicate(timeout=60)
    return worker.returncode, errors.decode()


def run_parts(src: Path, dst: Path, n: int) -> None:
    for i in range(1, n + 1):
        assert main(["compress", str(src), str(dst), "--shards", f"{i}/{n}", "-q"]) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_worker_dies(number: signal.Signals, large: Path, expected: dict[str, str], tmp_path: Path) -> None:
    dst = tmp_path / "c"
    before = digests(large)
    code, _ = finish(caught(large, dst, "1/2"), [number, signal.SIGCONT])
    assert code in (-number, 130)
    assert not dst.exists()
    assert main(["compress", str(large), str(dst), "--merge"]) == 2
    run_parts(large, dst, 2)
    assert main(["compress", str(large), str(dst), "--merge", "-q"]) == 0
    assert digests(dst) == expected
    assert digests(large) == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_worker_wakes_up_after_the_merge(large: Path, expected: dict[str, str], tmp_path: Path) -> None:
    dst = tmp_path / "c"
    worker = caught(large, dst, "1/2")
    run_parts(large, dst, 2)
    assert main(["compress", str(large), str(dst), "--merge", "-q"]) == 0
    code, errors = finish(worker, [signal.SIGCONT])
    assert (code, errors.count("\n")) == (2, 1)
    assert "merged or removed by another process" in errors
    assert digests(dst) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_workers_at_once(large: Path, expected: dict[str, str], tmp_path: Path) -> None:
    dst = tmp_path / "c"
    command = [sys.executable, "-m", "bitforbit.cli", "compress", large, dst, "--threads", "1", "--shards"]
    workers = [subprocess.Popen([*command, f"{i}/2"], stdout=subprocess.DEVNULL) for i in (1, 2, 1)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert main(["compress", str(large), str(dst), "--merge", "-q"]) == 0
    assert digests(dst) == expected


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, dst = str(write_model(tmp_path / "m")), str(tmp_path / "c")
    assert main(["compress", src, dst, "--shards", "1/2", "--json"]) == 0
    first = one_object(capsys.readouterr().out)
    assert (first["part"], first["remaining_files"]) == ([1, 2], 2)
    assert main(["compress", src, dst, "--merge", "--json"]) == 2
    error = one_object(capsys.readouterr().out)["error"]
    assert isinstance(error, dict)
    assert error["type"] == "IncompletePartsError"
    assert "model-00001-of-00002.safetensors" in error["message"]
    assert main(["compress", src, dst, "--shards", "1/2"]) == 0
    assert "2 file(s) of other parts are not finished" in capsys.readouterr().out
    assert main(["compress", src, dst, "--shards", "2/2"]) == 0
    assert "--merge" in capsys.readouterr().out
    assert main(["compress", src, dst, "--merge", "--json"]) == 0
    merged = one_object(capsys.readouterr().out)
    assert (merged["part"], merged["remaining_files"], merged["files"]) == (None, 0, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shards", "1"],
        ["--shards", "0/2"],
        ["--shards", "3/2"],
        ["--shards", "1/2/3"],
        ["--shards", "-1/2"],
        ["--shards", "1/2", "--merge"],
        ["--shards", "1/2", "--format", "df11"],
        ["--merge", "--format", "df11"],
    ],
)
def test_usage(arguments: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(model), str(tmp_path / "c"), *arguments, "--json"]) == 2
    error = one_object(capsys.readouterr().out)["error"]
    assert isinstance(error, dict)
    assert error["type"] == "UsageError"
    assert not list(tmp_path.iterdir())
