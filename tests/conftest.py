"""Fixtures shared by all tests; its presence puts this directory on the path, so that ``helpers`` can be imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.models import build_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small sharded model directory."""
    return build_model(tmp_path / "model")
