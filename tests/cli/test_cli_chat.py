"""``bitforbit chat``: turns, commands, the end of input and Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_models import one_object
from text_models import make_all

from bitforbit.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("chat"))


def talk(model: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", str(model), "-n", "6", *arguments])


@pytest.mark.parametrize("kind", ["native", "chat"])
def test_turns(
    kind: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        talk(models[kind], "import os\n\nimport os\n/reset\nimport os\n/exit\nnever read\n", monkeypatch, "--json") == 0
    )
    value = one_object(capsys.readouterr().out)
    answers = value["answers"]
    assert isinstance(answers, list)
    assert len(answers) == 3
    assert answers[0] == answers[2]  # the history was forgotten
    assert int(str(value["prompt_tokens"])) > 0


def test_text(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(models["chat"], "import os\n/what\n/reset\n", monkeypatch, "--system", "Be brief.") == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "/what: no such command" in err
    assert "(forgotten)" in err
    assert "cut off" in err
    assert "tokens/s" in err
    assert talk(models["chat"], "", monkeypatch) == 0
    assert capsys.readouterr().out == ""


def test_a_full_context(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "x y " * 480
    assert talk(models["chat"], f"{long}\n{long}\n/reset\nimport os\n", monkeypatch) == 0
    assert "/reset begins a new one" in capsys.readouterr().err


def test_on_a_terminal(models: dict[str, Path]) -> None:
    """A prompt to type at; Ctrl-C ends an answer, not the conversation; Ctrl-D leaves."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "bitforbit.cli", "chat", str(models["chat"]), "-n", "900", "--threads", "1"]
    env = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=env, start_new_session=True
    )
    os.close(follower)
    shown = b""

    def wait_for(words: bytes, after: int = 0) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while words not in shown[after:]:
            assert time.monotonic() < end, shown
            shown += os.read(leader, 65536)

    try:
        wait_for(b"> ")
        assert b"/reset forgets" in shown
        os.write(leader, b"import os\n")
        length = len(shown)
        wait_for(b"import os\r\n", length)
        length = len(shown)
        while len(shown) < length + 20:
            shown += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        wait_for(b"stopped", length)
        wait_for(b"> ", length)
        os.write(leader, b"/exit\n")
        wait_for(b"tokens/s", length)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert b"Traceback" not in shown
