"""``bitforbit bench``: the same output first, then figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cli_models import one_object
from text_models import make_all

from bitforbit.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")

SMALL = ["--tokens", "4", "--prompt-tokens", "5", "--rounds", "1"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("bench"))


def test_json(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    assert main(["bench", str(models["native"]), *SMALL, "--batch", "2", "--json", "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert not err
    value = one_object(out)
    assert value["exact"] is True
    assert value["paired"] is True
    assert picture.read_bytes().startswith(b"\x89PNG")
    variants = value["variants"]
    assert isinstance(variants, list)
    assert [v["mode"] for v in variants] == ["bf16", "exact", "fused"]
    for v in variants:
        for name in (
            "tokens_per_second",
            "first_token_seconds",
            "load_seconds",
            "running_peak",
            "peak",
            "weight_bytes",
        ):
            assert v[name] > 0, name
        assert v["peak"] > v["baseline"]
    plain, exact, fused = variants
    assert exact["equal_tokens"] == plain["equal_tokens"] == 8
    assert exact["logits_equal"] is True
    assert exact["weight_bytes"] < 0.75 * plain["weight_bytes"] == 0.75 * 15_735_808
    assert sum(plain["ran"]["linears"].values()) == 0
    assert sum(exact["ran"]["linears"].values()) > 0
    assert fused["ran"]["linears_share"]["fused"] == 1


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure each variant here: starting processes takes most of the time."""
    from bitforbit.integrations.generation import compare
    from bitforbit.integrations.generation.measure import measure_alone

    monkeypatch.setattr(compare, "measure_in_process", lambda path, *rest: measure_alone(str(path), *rest))


@pytest.mark.usefixtures("in_this_process")
def test_table(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(models["plain"]), *SMALL, "--mode", "exact", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    for words in (
        "plain; compressed while loading",
        "1 thread(s)",
        "medians of 1 rounds",
        "same bits",
        "linears in exact",
    ):
        assert words in out
    assert "fused  " not in out


@pytest.mark.usefixtures("in_this_process")
def test_a_difference_exits_with_1(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitforbit.integrations.generation import compare

    real = compare.measure_in_process

    def wrong(path: Path, mode: str, *rest: object) -> object:
        result = real(path, mode, *rest)  # type: ignore[arg-type]
        return dataclasses.replace(result, digest="0" * 64) if mode == "exact" else result

    monkeypatch.setattr(compare, "measure_in_process", wrong)
    monkeypatch.setattr(compare, "_fit_together", lambda _: False)
    assert main(["bench", str(models["native"]), *SMALL, "--mode", "exact"]) == 1
    out = capsys.readouterr().out
    assert "NOT EXACT" in out
    assert "one process after the other" in out


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--mode", "fast"], "UsageError"),
        (["--mode", ","], "UsageError"),
        (["--tokens", "2000"], "PromptTooLongError"),
        (["--plot", "picture.jpg"], "UsageError"),
    ],
)
def test_errors(arguments: list[str], kind: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(models["native"]), *arguments, "--json"]) == 2
    error = one_object(capsys.readouterr().out)["error"]
    assert isinstance(error, dict)
    assert error["type"] == kind
