"""Tests of a real GPU: skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import bitforbit
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


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Plain and compressed directory of a model of ``integrations.zoo``, by name."""
    from integrations import zoo  # needs transformers, which most of these tests do not

    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            zoo.write(name, root / "plain")
            bitforbit.compress(root / "plain", root / "native")
            made[name] = root / "plain", root / "native"
        return made[name]

    return get
