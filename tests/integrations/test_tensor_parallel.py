"""Models that are split over two processes compute what plain ones compute that are split the same way.

The processes are started once and run all of tensor_parallel_cases.py; each test looks at what became of one case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integrations import tensor_parallel_cases

_FILE = Path(tensor_parallel_cases.__file__)
_SECONDS = 280


def environment() -> dict[str, str]:
    """For processes that import what this one does, and run on the CPU: one GPU is not enough for two of them."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of both processes: case -> traceback, empty for success."""
    folder = tmp_path_factory.mktemp("parallel")
    processes = [
        subprocess.Popen(
            [sys.executable, str(_FILE), str(rank), str(folder)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        messages = [process.communicate(timeout=_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = []
    for rank, message in enumerate(messages):
        path = folder / f"{rank}.json"
        assert path.is_file(), message
        found.append(json.loads(path.read_text()))
    return found


@pytest.mark.parametrize("case", tensor_parallel_cases.NAMES)
def test_case(outcomes: list[dict[str, str]], case: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert case in outcome, f"process {rank} did not get there"
        assert not outcome[case], outcome[case]


@pytest.mark.slow
def test_example() -> None:
    command = [sys.executable, str(Path(__file__).parents[2] / "examples" / "tensor_parallel.py")]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert run.returncode == 0, run.stderr
    assert "2 processes: the same tokens" in run.stdout
