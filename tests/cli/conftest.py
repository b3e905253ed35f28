"""A small model for the command line's tests, and a way to run commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_models import Run, write_model

from bitforbit.cli import main


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def compressed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed") / "llama"
    assert main(["compress", str(model), str(path), "--json"]) == 0
    return path


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread for torch and for bitforbit: tiny models gain nothing from more, and lose a lot on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setenv("BITFORBIT_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run ``bitforbit ARGUMENTS`` in a process of its own."""

    def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bitforbit.cli", *map(str, arguments)]
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "COLUMNS": "140", **environment}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    return run_command
