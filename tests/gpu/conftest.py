"""Tests of a real GPU: skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitforbit.cuda import device

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this directory has the marker ``gpu`` and needs a GPU."""
    missing = pytest.mark.skip(reason="needs an NVIDIA GPU")
    there = device.count() > 0
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not there:
                item.add_marker(missing)
