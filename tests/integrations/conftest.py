"""Tiny random models, each as a plain and a compressed directory, made once per session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bitforbit
from bitforbit.integrations import autoload

os.environ.setdefault("HF_HUB_OFFLINE", "1")

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]

# What torch does where the package is installed; the source tree has no entry points.
autoload.autoload()

Directories = Callable[[str], tuple[Path, Path]]
"""Name of a model of the zoo -> its plain and its compressed directory."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for two."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Plain and compressed directory of a model of the zoo."""
    from integrations import zoo

    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name.replace("/", "-"))
            zoo.write(name, root / "plain")
            bitforbit.compress(root / "plain", root / "native", threads=1)
            made[name] = root / "plain", root / "native"
        return made[name]

    return get
