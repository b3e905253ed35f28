"""``bitforbit io``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitforbit.cli import main
from bitforbit.iomodel import choose


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "--n", "8192", "--d", "128", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    assert "116,224 words (H100 SMEM), 7.09 d^2" in text
    flash = next(line for line in text.splitlines() if line.startswith("FlashAttention-2 order"))
    assert "41,943,040" in flash
    assert flash.endswith("<- fewest")
    assert "crossover: from 11,524 words on (0.70 d^2)" in text


def test_the_guide_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "io.md").read_text()
    command, _, printed = guide.split("```\n$ bitforbit ")[1].split("```")[0].partition("\n")
    assert main(command.split()) == 0
    assert capsys.readouterr().out == printed


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "--memory", "300", "--d", "128"]) == 0
    assert "needs 387 words" in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "--n", "1000", "--d", "64", "--memory", "2000", "--dtype", "f32", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    choice = choose(1000, 64, 2000)
    assert facts["choice"] == choice.best.algorithm.name
    assert facts["lower_bound_words"] == choice.bound
    assert [a["words"] for a in facts["algorithms"]] == [p.words for p in choice.predictions]
    assert (facts["item_bytes"], facts["memory_words"], facts["memory"]) == (4, 2000, "8 kB")


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", "F32"), ("CPU:l1", "F32"), ("A100", "BF16"), ("h200:l2", "BF16")]
)
def test_devices(device: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "--device", device, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == dtype


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for i, arguments in enumerate(
        (["--d", "16"], ["--n", "7", "--d", "300", "--memory", "5"], ["--n", "1", "--d", "1"])
    ):
        picture = tmp_path / f"{i}.png"
        assert main(["io", *arguments, "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "picture in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "N: expected at least 1"),
        (["--d", "0"], "d: expected at least 1"),
        (["--d", "100000"], "d: expected at most 65536"),
        (["--memory", "2"], "at least 3 words"),
        (["--memory", "-7"], "M: expected at least 1"),
        (["--device", "gtx"], "a device among H100"),
        (["--device", "H100:L7"], "a level of memory among"),
        (["--device", "H100", "--memory", "100"], "one of --memory and --device"),
        (["--dtype", "int3"], "--dtype: expected F32"),
        (["--plot", "picture.svg"], "expected the name of a .png file"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert main(["io", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
