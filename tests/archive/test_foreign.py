"""DFloat11 models go through their own package, and appear as atomically as native ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitforbit import archive, errors
from helpers.models import gaussian, safetensors_bytes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the package; returns what it was called with."""
    seen: list[dict[str, Any]] = []

    def write(src: Path, tree: Path, **options: Any) -> None:
        assert not list(tree.iterdir())
        (tree / "model.safetensors").write_bytes(safetensors_bytes({"w": gaussian((8, 8))}))
        (tree / "config.json").write_text(json.dumps({"dfloat11_config": {}} if "units" in options else {}))
        seen.append(options)

    package = SimpleNamespace(write_directory=write, write_plain=write)
    monkeypatch.setitem(sys.modules, "bitforbit.archive.dfloat11", package)
    return seen


def test_there_and_back(model: Path, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    report = archive.compress(model, tmp_path / "c", format="df11", units=["a"], threads=1)
    assert (report.format, report.tensors, report.weight_compressed_bytes) == ("df11", 8, 128)
    back = archive.decompress(tmp_path / "c", tmp_path / "r", shapes={"w": (8, 8)})
    assert (back.format, back.tensors) == ("df11", 1)
    assert [set(call) for call in calls] == [{"units", "threads", "progress"}, {"shapes", "threads", "progress"}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "model", "r"]
    with pytest.raises(errors.AlreadyCompressedError):
        archive.compress(tmp_path / "c", tmp_path / "d")


def test_options_of_the_other_format(model: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="units"):
        archive.compress(model, tmp_path / "c", units=["a"])
    archive.compress(model, tmp_path / "c")
    with pytest.raises(errors.UsageError, match="shapes"):
        archive.decompress(tmp_path / "c", tmp_path / "r", shapes={})
