"""What happens when things go wrong, and when nobody, or a person, is watching."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_models import Run, one_object
from safetensors.numpy import save_file

from bitforbit import archive
from bitforbit.cli import inference, main


def test_usage_errors(run: Run) -> None:
    for arguments in (
        ["compress"],
        ["compress", "a", "b", "--format", "zip"],
        ["nonsense"],
        ["verify", "a", "--threads", "0"],
        ["run", "a", "--prompt", "x", "--threads", "100000"],
        ["run", "a", "--prompt", "x", "--seed", str(2**63)],
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert not done.stdout
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        done = run(*arguments, "--json")
        assert done.returncode == 2
        assert one_object(done.stdout)["error"]["type"] == "UsageError"  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["compress", "{tmp}/absent", "{tmp}/c"], "SourceNotFoundError"),
        (["compress", "{model}", "{model}/inside"], "DestinationInsideSourceError"),
        (["compress", "{model}", "{compressed}"], "DestinationExistsError"),
        (["compress", "{compressed}", "{tmp}/c"], "AlreadyCompressedError"),
        (["decompress", "{model}", "{tmp}/c"], "NotCompressedError"),
        (["verify", "{model}"], "NotCompressedError"),
        (["verify", "{compressed}", "--against", "{tmp}/absent"], "SourceNotFoundError"),
        (["inspect", "{tmp}/absent"], "SourceNotFoundError"),
        (["compress", "{model}", "{tmp}/c", "--format", "df11", "--units", "{tmp}/absent"], "FileNotFoundError"),
        (["compress", "{model}", "{tmp}/c", "--format", "df11", "--units", "{model}/config.json"], "UsageError"),
        (["decompress", "{compressed}", "{tmp}/c", "--shapes", "{model}/config.json"], "UsageError"),
        (["compress", "{model}", "{tmp}/c", "--units", "{units}"], "UsageError"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    kind: str,
    model: Path,
    compressed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "units.json").write_text('{"model\\\\.layers\\\\.\\\\d+": ["mlp.up_proj"]}')
    places = {"model": model, "compressed": compressed, "tmp": tmp_path, "units": tmp_path / "units.json"}
    args = [argument.format(**places) for argument in arguments]
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert main([*args, "--json"]) == 2
    out, err = capsys.readouterr()
    assert not err
    error = one_object(out)["error"]
    assert isinstance(error, dict)
    assert error["type"] == kind
    assert not (tmp_path / "c").exists()


def test_interruption(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "compress", interrupted)
    monkeypatch.setattr(archive, "verify", interrupted)
    assert main(["compress", str(model), str(tmp_path / "c")]) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(["verify", str(model)]) == 130
    assert "--resume" not in capsys.readouterr().err
    assert main(["compress", str(model), str(tmp_path / "c"), "--json"]) == 130
    assert one_object(capsys.readouterr().out)["error"]["type"] == "KeyboardInterrupt"  # type: ignore[index]


def test_a_reader_that_went_away(model: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "bitforbit.cli", "inspect", str(model)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141
    assert not done.stderr


def test_names_cannot_drive_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of tensors and files come from strangers."""
    name = "a\x1b[2J\x07\n\u202eb"
    source = tmp_path / f"model{name}"
    source.mkdir()
    save_file({name: np.ones((64, 64), np.float32)}, source / "m.safetensors")
    assert main(["compress", str(source), str(tmp_path / "c"), "-q"]) == 0
    assert main(["inspect", str(tmp_path / "c"), "-q", "--all"]) == 0
    (tmp_path / "c" / f"x{name}").touch()
    assert main(["verify", str(tmp_path / "c"), "-q"]) == 0
    assert main(["verify", str(source), "-q"]) == 2
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & {*out, *err}
    assert r"a\x1b[2J\x07\n\u202eb" in out
    assert err.count("\n") == 1


def test_model_text_cannot_drive_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal, shown in ((True, "a\\x1b[2J\n\tü"), (False, "a\x1b[2J\n\tü")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        inference.write("a\x1b[2J\n\tü")
        assert capsys.readouterr().out == shown


def test_a_terminal_that_knows_ascii_only(run: Run, tmp_path: Path) -> None:
    save_file({"ü": np.ones((64, 64), np.float32)}, tmp_path / "m.safetensors")
    done = run("inspect", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"\xfc" in done.stdout


def test_a_missing_shard_is_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": np.ones((64, 64), np.float32)}, source / "model-1-of-2.safetensors")
    weight_map = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors", "c": 3}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["compress", str(source), str(tmp_path / "c"), "-q"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: ")
    assert "model-2-of-2.safetensors" in err
    assert main(["compress", str(source), str(tmp_path / "d"), "--json"]) == 0
    assert one_object(capsys.readouterr().out)["missing_files"] == ["model-2-of-2.safetensors"]


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("extra", "visible"), [((), True), (("--quiet",), False), (("--json",), False)])
def test_progress_on_a_terminal_only(model: Path, tmp_path: Path, extra: tuple[str, ...], visible: bool) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "bitforbit.cli", "compress", str(model), str(tmp_path / "c"), *extra]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 65536):
            shown += piece
    except OSError:  # the end, on a pseudo-terminal
        pass
    os.close(leader)
    assert done.returncode == 0
    assert (b"Compressing" in shown and b"left" in shown) is visible
    assert bool(shown) is visible
    assert b"Compressing" not in done.stdout
