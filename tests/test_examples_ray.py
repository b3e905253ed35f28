"""The Ray example on a cluster of one machine with two workers, one of which is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import bitforbit
from helpers import assert_same_tree
from helpers.models import build_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_compress.py"

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")


def kill_one(dst: Path, driver: subprocess.Popen[str]) -> None:
    """Kill the first worker that is seen writing a file; its process id is in the temporary file's name."""
    while driver.poll() is None:
        for path in dst.parent.glob(f"{dst.name}.bitforbit-parts/*/tmp/*"):
            os.kill(int(path.name.split("-")[-2]), signal.SIGKILL)
            return
        time.sleep(0.001)
    pytest.fail(f"no worker was seen writing: {driver.communicate()[0]}")


def test_a_worker_dies(tmp_path: Path) -> None:
    src = build_model(tmp_path / "model", shards=60, dim=256)
    bitforbit.compress(src, tmp_path / "expected")
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:  # short: sockets lie in it
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(bitforbit.__file__).parents[1]),
            "HOME": temporary,
            "RAY_TMPDIR": temporary,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, str(EXAMPLE), str(src), str(tmp_path / "c"), "--cpus", "1", "--parts", "6"]
        driver = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        kill_one(tmp_path / "c", driver)
        output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    assert len(set(re.findall(r"^part (\d)/6 done", output, re.M))) == 6
    assert_same_tree(tmp_path / "c", tmp_path / "expected")
    assert not list(tmp_path.glob("c.*"))
