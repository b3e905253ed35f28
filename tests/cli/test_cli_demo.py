"""The demonstration, on a stand-in for the packaged model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from cli_models import digests

from bitforbit import demo, errors
from bitforbit.archive import compress
from bitforbit.cli import main
from bitforbit.integrations import generation

FORMATS = demo.FORMATS if importlib.util.find_spec("bitforbit.archive.dfloat11") else ("planes",)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "plain"
    shutil.copytree(model, path)
    facts = {
        "held_out": {"perplexity_per_token": 12.345, "bits_per_byte": 1.5},
        "held_out_modules": ["a.py", "b.py"],
        "parameters": 7_900_000,
        "weights_dtype": "bfloat16",
        "training_bytes": 10_000_000,
        "training_files": 700,
        "tokens_trained": 1_000_000,
        "seconds": 3000.0,
        "versions": {"python": "3.11.7"},
    }
    (path / "training_report.json").write_text(json.dumps(facts))
    return path


@pytest.fixture(scope="module")
def packaged(plain: Path) -> Path:
    path = plain.parent / "packaged"
    compress(plain, path)
    return path


def test_everything_comes_back(packaged: Path, plain: Path, tmp_path: Path) -> None:
    report = demo.run(packaged, formats=FORMATS, keep=tmp_path / "kept", threads=2)
    assert report.exact
    assert digests(tmp_path / "kept" / "original") == digests(plain)
    assert [result.format for result in report.formats] == list(FORMATS)
    planes = report.formats[0]
    assert planes.equal_files == planes.files == len(digests(plain))
    for result in report.formats:
        assert result.exact
        assert result.equal_tensors == result.tensors > 10
        assert 60 < result.percent_of_original < 75
        assert min(result.compress_gb_per_second, result.decompress_gb_per_second) > 0
        assert (tmp_path / "kept" / result.format).is_dir()
    assert report.facts["parameters"] == 7_900_000
    assert report.memory.decode_gb_per_second > 0
    assert json.loads(json.dumps(report.to_json()))["exact"] is True


def test_a_difference_is_noticed(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo.decompress

    def wrong(src: Path, dst: Path, **options: object) -> object:
        report = real(src, dst, **options)  # type: ignore[arg-type]
        if dst.name == "planes-restored":
            with (dst / "model-00001-of-00002.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"\xff")
        return report

    monkeypatch.setattr(demo, "decompress", wrong)
    report = demo.run(packaged, formats=["planes"])
    assert not report.exact
    assert report.formats[0].equal_tensors == report.formats[0].tensors - 1
    assert report.formats[0].equal_files == report.formats[0].files - 1


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is no model that could write text."""
    monkeypatch.setattr(generation, "missing", lambda: ["torch"])


@pytest.mark.usefixtures("no_torch")
def test_command(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_PACKAGED", packaged)
    monkeypatch.setattr(demo, "FORMATS", FORMATS)
    assert main(["demo", "--keep", str(tmp_path / "kept")]) == 0
    out = capsys.readouterr().out
    for words in (
        "7,900,000",
        "12.35",
        "Python 3.11.7",
        "700 files",
        "planes",
        "came back",
        "GB/s",
        str(tmp_path / "kept"),
        "pip install torch transformers",
    ):
        assert words in out
    assert main(["demo", "--keep", str(tmp_path / "kept")]) == 2
    assert "--keep" in capsys.readouterr().err
    assert main(["demo", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["exact"] is True
    assert value["kept"] is None
    assert value["generation"] is None


@pytest.mark.usefixtures("no_torch")
def test_inexact_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, packaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    report = dataclasses.replace(demo.run(packaged, formats=["planes"]), exact=False, facts={})
    monkeypatch.setattr(demo, "run", lambda **_: report)
    assert main(["demo"]) == 1
    assert "NOT EXACT" in capsys.readouterr().out


def test_absent_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.SourceNotFoundError, match="demonstration model"):
        demo.model_path(tmp_path / "absent")
    monkeypatch.setattr(demo, "_PACKAGED", tmp_path / "absent")
    assert main(["demo"]) == 2
    assert "reinstall" in capsys.readouterr().err


# --- the part that writes text ---------------------------------------------------------------------------------------

TORCH = pytest.mark.skipif(bool(generation.missing()), reason="without torch and transformers")


@TORCH
def test_text_from_the_packaged_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("writes from its compressed weights", "class Stack", "192 of 192", "tokens, one for one"):
        assert words in out
    assert main(["demo", "--threads", "1", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["generation"]
    assert written["exact"] is True
    assert [variant["mode"] for variant in written["variants"]] == ["bf16", "exact", "fused"]
    plain, exact, _ = written["variants"]
    assert exact["texts"] == plain["texts"]
    assert exact["weight_bytes"] < 0.7 * plain["weight_bytes"]


@TORCH
def test_other_text_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from bitforbit.integrations.generation import showcase

    real = showcase._write

    def wrong(loaded: object) -> object:
        ids, *rest = real(loaded)  # type: ignore[arg-type]
        if loaded.mode == "exact":  # type: ignore[attr-defined]
            ids[1][-1] += 1
        return ids, *rest

    monkeypatch.setattr(showcase, "_write", wrong)
    assert main(["demo", "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert "NOT EXACT" in out
    assert "191 of 192" in out
