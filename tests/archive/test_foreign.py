"""DFloat11 models go through the same front door, and appear as atomically as native ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitforbit import archive, errors

GOLDEN = Path(__file__).parents[1] / "data" / "df11-official" / "llama_dir"
LAYER = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Recorder:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.total = self.done = self.finished = 0

    def start(self, total_bytes: int, description: str) -> None:
        self.total += total_bytes

    def advance(self, nbytes: int) -> None:
        self.done += nbytes

    def finish(self) -> None:
        self.finished += 1


def test_there_and_back(tmp_path: Path) -> None:
    progress = Recorder()
    report = archive.compress(GOLDEN / "bf16", tmp_path / "c", format="df11", progress=progress)
    assert (report.format, report.tensors) == ("df11", 21)
    assert progress.done == progress.total > 0
    assert progress.finished == 1
    for path in (GOLDEN / "df11").iterdir():
        assert (tmp_path / "c" / path.name).read_bytes() == path.read_bytes(), path.name
    progress = Recorder()
    back = archive.decompress(tmp_path / "c", tmp_path / "r", threads=2, progress=progress)
    assert progress.done == progress.total > 0
    assert (back.format, back.tensors) == ("df11", 21)
    for path in (GOLDEN / "bf16").iterdir():
        assert (tmp_path / "r" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "r"]
    with pytest.raises(errors.AlreadyCompressedError):
        archive.compress(tmp_path / "c", tmp_path / "d")


def test_units_of_ones_own(tmp_path: Path) -> None:
    units = {r"model\.layers\.\d+\.self_attn": LAYER}
    archive.compress(GOLDEN / "bf16", tmp_path / "c", format="df11", units=units)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["dfloat11_config"]["pattern_dict"] == units
    archive.decompress(tmp_path / "c", tmp_path / "r")
    restored = (tmp_path / "r" / "model.safetensors").read_bytes()
    assert restored == (GOLDEN / "bf16" / "model.safetensors").read_bytes()


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError):
        archive.compress(GOLDEN / "bf16", tmp_path / "c", format="df11", units={"nothing": ["there"]})
    assert not list(tmp_path.iterdir())


def test_options_of_the_other_format(model: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="units"):
        archive.compress(model, tmp_path / "c", units={"a": []})
    archive.compress(model, tmp_path / "c")
    with pytest.raises(errors.UsageError, match="shapes"):
        archive.decompress(tmp_path / "c", tmp_path / "r", shapes={})
