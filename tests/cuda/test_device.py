"""What is told of GPUs, and what is said where one cannot be used."""

from __future__ import annotations

import sys

import pytest

from bitforbit.cuda import compiler, device, driver
from bitforbit.errors import (
    GpuArchitectureError,
    GpuDriverError,
    GpuNotFoundError,
    GpuPackageError,
    GpuUnavailableError,
)
from helpers.driver_standin import StandIn

pytest.importorskip("cuda.bindings.nvrtc")


def test_properties() -> None:
    found = device.examine(StandIn(), 1)  # type: ignore[arg-type]
    assert found.name == "stand-in 1"
    assert found.compute_capability == (9, 0)
    assert found.multiprocessors == 132
    assert found.l2_bytes == 50 << 20
    assert found.shared_bytes_per_block == 227 << 10
    assert found.arch == compiler.target((9, 0)) == "sm_90a"


def test_a_driver_older_than_the_compiler() -> None:
    with pytest.raises(GpuDriverError, match=r"CUDA 13 .*got one for CUDA 12\.4; install a newer driver"):
        device.examine(StandIn(cuda=(12, 4)), 0)  # type: ignore[arg-type]


def test_a_driver_newer_than_the_compiler_is_fine() -> None:
    assert device.examine(StandIn(cuda=(14, 1)), 0).name == "stand-in 0"  # type: ignore[arg-type]


@pytest.mark.parametrize("ordinal", [2, -1])
def test_a_gpu_that_is_not_there(ordinal: int) -> None:
    with pytest.raises(GpuNotFoundError, match=f"below 2, got cuda:{ordinal}"):
        device.examine(StandIn(), ordinal)  # type: ignore[arg-type]


def test_a_gpu_that_is_too_old() -> None:
    old = StandIn()
    old.attributes["COMPUTE_CAPABILITY_MAJOR"] = 7
    with pytest.raises(GpuArchitectureError, match=r"got 7\.0"):
        device.examine(old, 0)  # type: ignore[arg-type]


def test_all_causes_are_one_error() -> None:
    for cause in (GpuPackageError, GpuDriverError, GpuNotFoundError, GpuArchitectureError):
        assert issubclass(cause, GpuUnavailableError)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    driver._started.cache_clear()
    device.require.cache_clear()
    compiler.version.cache_clear()
    with pytest.raises(GpuPackageError, match=r"pip install 'bitforbit\[cuda\]'"):
        device.require()
    assert device.count() == 0
    assert not device.available()
    status = device.status()
    assert status.gpus == ()
    assert status.nvrtc is None
    assert status.problem is not None
    assert "cuda-bindings" in status.problem


@pytest.mark.skipif(device.count() > 0, reason="there is a GPU")
def test_this_machine_says_why_it_has_no_gpu() -> None:
    with pytest.raises(GpuUnavailableError, match="on the CPU"):
        device.require()
    status = device.status()
    assert status.nvrtc == ".".join(map(str, compiler.version()))
    assert status.problem
