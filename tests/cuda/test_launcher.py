"""Launches up to the driver's door: binaries are real, the driver is a stand-in that records."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bitforbit.cuda import device, sources
from bitforbit.cuda.kernel import F32, I32, U32, U64, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.launcher import CudaLauncher
from bitforbit.errors import KernelBuildError, KernelLaunchError
from helpers.driver_standin import StandIn

pytest.importorskip("cuda.bindings.nvrtc")

TEXT = """
extern "C" __global__ void mixed(void* p, unsigned u, int i, unsigned long long w, float f) {}
extern "C" __global__ void lone(void* p) {}
extern "C" __global__ void none() {}
"""
MIXED = Kernel("mixed", "probe.cu", (Pointer, U32, I32, U64, F32))
LONE = Kernel("lone", "probe.cu", (Pointer,))
NONE = Kernel("none", "probe.cu", ())
CONFIG = LaunchConfig.linear(3, 64)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in that knows the kernels of a text of its own."""
    (tmp_path / "probe.cu").write_text(TEXT)
    (tmp_path / "broken.cu").write_text("nonsense")
    monkeypatch.setattr(sources, "KERNELS", tmp_path)
    monkeypatch.setattr(sources, "text", sources.text.__wrapped__)
    return StandIn((MIXED, LONE, NONE))


@pytest.fixture
def launcher(driver: StandIn) -> CudaLauncher:
    return CudaLauncher(0, driver, device.properties(driver, 0))  # type: ignore[arg-type]


def test_parameters_arrive_with_their_types(driver: StandIn, launcher: CudaLauncher) -> None:
    launcher.launch(MIXED, LaunchConfig((3, 2, 1), (64, 2, 1), 1024), (2**63 + 5, 2**32 - 1, -7, 2**64 - 1, 0.5), 77)
    (launch,) = driver.launches
    assert launch.values == [2**63 + 5, 2**32 - 1, -7, 2**64 - 1, 0.5]
    assert (launch.grid, launch.block) == ((3, 2, 1), (64, 2, 1))
    assert (launch.dynamic_shared, launch.stream) == (1024, 77)
    assert launch.function[0].startswith(b"\x7fELF")
    assert driver.limits == []


def test_null_pointers_and_no_parameters(driver: StandIn, launcher: CudaLauncher) -> None:
    launcher.launch(LONE, CONFIG, (0,), 0)
    launcher.launch(NONE, CONFIG, (), 0)
    assert [launch.values for launch in driver.launches] == [[None], []]


def test_a_text_is_loaded_once_for_all_its_entry_points(driver: StandIn, launcher: CudaLauncher) -> None:
    launcher.prepare((MIXED, LONE))
    assert len(driver.loads) == 1
    for _ in range(3):
        launcher.launch(LONE, CONFIG, (1,), 0)
        launcher.launch(Kernel("lone", "probe.cu", (Pointer,)), CONFIG, (1,), 0)  # equal, but another object
    launcher.launch(Kernel("lone", "probe.cu", (Pointer,), (("N", "1"),)), CONFIG, (1,), 0)
    assert len(driver.loads) == 2
    assert len(driver.launches) == 7


def test_launches_happen_in_the_primary_context_and_leave_the_thread_as_it_was(
    driver: StandIn, launcher: CudaLauncher
) -> None:
    for before in ([], [1000], [1001]):
        driver.stack[:] = before
        launcher.launch(LONE, CONFIG, (1,), 0)
        assert driver.stack == before
    assert [launch.context for launch in driver.launches] == [1000] * 3
    assert {context for context, _ in driver.loads} == {1000}


def test_two_devices_load_for_themselves(driver: StandIn, launcher: CudaLauncher) -> None:
    other = CudaLauncher(1, driver, device.properties(driver, 1))  # type: ignore[arg-type]
    launcher.launch(LONE, CONFIG, (1,), 0)
    other.launch(LONE, CONFIG, (1,), 0)
    assert [launch.context for launch in driver.launches] == [1000, 1001]
    assert [context for context, _ in driver.loads] == [1000, 1001]


def test_large_shared_memory_is_asked_for_once(driver: StandIn, launcher: CudaLauncher) -> None:
    for nbytes in (0, 48 << 10, 100 << 10, 60 << 10, 100 << 10, 200 << 10):
        launcher.launch(LONE, LaunchConfig.linear(1, 32, nbytes), (1,), 0)
    assert driver.limits == [("lone", 100 << 10), ("lone", 200 << 10)]


def test_static_shared_memory_counts(driver: StandIn, launcher: CudaLauncher) -> None:
    driver.static = 1000
    for nbytes in ((48 << 10) - 1000, (48 << 10) - 999):
        launcher.launch(LONE, LaunchConfig.linear(1, 32, nbytes), (1,), 0)
    assert driver.limits == [("lone", (48 << 10) - 999)]


def test_an_empty_grid_enqueues_nothing(driver: StandIn, launcher: CudaLauncher) -> None:
    launcher.launch(LONE, LaunchConfig.linear(0, 32), (1,), 0)
    assert driver.launches == []


@pytest.mark.parametrize("arguments", [(), (1, 2), (-1,), (2**64,), (0.5,), ("x",)])
def test_arguments_that_do_not_fit(launcher: CudaLauncher, arguments: tuple[int, ...]) -> None:
    with pytest.raises(KernelLaunchError, match=r"lone: expected arguments \(c_void_p\)"):
        launcher.launch(LONE, CONFIG, arguments, 0)


def test_what_the_driver_refuses_names_the_kernel(driver: StandIn, launcher: CudaLauncher) -> None:
    driver.refuse = "expected cuLaunchKernel to succeed, got CUDA_ERROR_INVALID_VALUE (1)"
    with pytest.raises(KernelLaunchError, match=r"lone with LaunchConfig\(.*CUDA_ERROR_INVALID_VALUE"):
        launcher.launch(LONE, CONFIG, (1,), 0)
    assert driver.stack == []


def test_a_text_that_does_not_compile(driver: StandIn, launcher: CudaLauncher) -> None:
    with pytest.raises(KernelBuildError, match=r"broken\.cu to compile for sm_90a"):
        launcher.prepare((Kernel("f", "broken.cu", ()),))
    assert driver.stack == []


def test_threads_do_not_mix_their_parameters(driver: StandIn, launcher: CudaLauncher) -> None:
    driver.stack.append(1000)

    def work(number: int) -> None:
        for i in range(200):
            launcher.launch(MIXED, CONFIG, (number, i, number, i, 0.0), number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 800
    for launch in driver.launches:
        number, i, same, also, _ = launch.values
        assert (number, i) == (same, also)
        assert launch.stream == number
    assert len(driver.loads) == 1
