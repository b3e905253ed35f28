"""Fixtures shared by all tests; its presence puts this directory on the path, so that ``helpers`` can be imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.models import build_model

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So do shells for what they start in the background; it is inherited, and many tests send Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small sharded model directory."""
    return build_model(tmp_path / "model")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is found out about this machine while testing stays out of the user's cache, and the other way round."""
    kept = os.environ.get("BITFORBIT_TEST_CACHE")  # where several runs share the kernels that they compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFORBIT_CACHE", kept or str(tmp_path_factory.mktemp("cache")))
        yield
