"""The examples run."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_damaged_files(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(EXAMPLES / "damaged_files.py"))
    assert len(module["DAMAGE"]) == 10
    assert module["main"]() == 0
    assert capsys.readouterr().out.count("Error:") == 10
