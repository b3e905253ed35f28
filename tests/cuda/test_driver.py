"""The driver's door itself: real cuda.bindings, in a process of its own, before a libcuda that writes down calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitforbit.cuda import cache, sources
from bitforbit.cuda.driver import Driver

pytest.importorskip("cuda.bindings.nvrtc")

SOURCE = Path(__file__).parents[1] / "helpers" / "libcuda_standin.c"
TEXT = 'extern "C" __global__ void fill(unsigned* gmem_out, unsigned value) { gmem_out[threadIdx.x] = value; }'


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the stand-in."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux")
    folder = tmp_path_factory.mktemp("libcuda")
    target = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(target), str(SOURCE)], check=True)
    return folder


def run(library: Path, tmp_path: Path, code: str, **variables: str) -> tuple[str, list[str]]:
    """What code prints in front of the stand-in, and the calls.

    The binary comes from the cache: NVRTC itself looks for libcuda and takes the stand-in for a real one.
    """
    file, log = tmp_path / "fill.cu", tmp_path / "log"
    file.write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFORBIT_CACHE", str(tmp_path / "cache"))
        cache.forget()
        cache.cubin(sources.text(str(file)), "sm_90a", (), str(file))
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library),
        "STANDIN_LOG": str(log),
        "BITFORBIT_CACHE": str(tmp_path / "cache"),
        **variables,
    }
    head = (
        "from bitforbit.cuda import compiler, device, driver, launcher\n"
        "from bitforbit.cuda.kernel import Kernel, LaunchConfig, Pointer, U32\n"
        f"FILL = Kernel('fill', {str(file)!r}, (Pointer, U32))\n"
    )
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), log.read_text().splitlines() if log.exists() else []


def test_properties(library: Path, tmp_path: Path) -> None:
    printed, _ = run(library, tmp_path, "print(device.count(), device.require(1), device.status())")
    assert printed.startswith("2 DeviceProperties(name='Stand-in 11', compute_capability=(9, 0), multiprocessors=132")
    assert "l2_bytes=33554432, shared_bytes_per_block=232448" in printed
    assert "gpus=('Stand-in 10 (compute capability 9.0)', 'Stand-in 11 (compute capability 9.0)')" in printed
    assert "driver='13.2'" in printed
    assert "problem=None" in printed


def test_memory(library: Path, tmp_path: Path) -> None:
    printed, _ = run(library, tmp_path, "print([driver.get().memory(i) >> 30 for i in range(2)])")
    assert printed == "[80, 81]"


def test_a_launch(library: Path, tmp_path: Path) -> None:
    code = (
        "there = launcher.for_device(1)\n"
        "config = LaunchConfig((3, 2, 1), (64, 1, 1), 100 << 10)\n"
        "for value in (5, 6): there.launch(FILL, config, (0xABCDEF0123456789, value), 0x77)\n"
        "assert driver.get().current_context() == 0\n"
    )
    _, calls = run(library, tmp_path, code)
    calls = [call for call in calls if not call.startswith("cuDeviceGetAttribute")]
    launch = "cuLaunchKernel 3000 (3 2 1) (64 1 1) 102400 stream 77 parameters abcdef0123456789 {} extra 0"
    assert calls == [
        "cuInit 0",
        "cuCtxPushCurrent 100b",
        "cuThreadExchangeStreamCaptureMode 2",
        "cuModuleLoadData 7fELF",
        "cuModuleGetFunction 2000 fill",
        "cuThreadExchangeStreamCaptureMode 0",
        "cuCtxPopCurrent 100b",
        "cuCtxPushCurrent 100b",
        "cuFuncSetAttribute 3000 8 102400",
        launch.format(5),
        "cuCtxPopCurrent 100b",
        "cuCtxPushCurrent 100b",
        launch.format(6),
        "cuCtxPopCurrent 100b",
    ]


def test_a_context_that_is_current_stays(library: Path, tmp_path: Path) -> None:
    code = (
        "there = launcher.for_device(0); there.prepare([FILL])\n"
        "driver.get().push(driver.get().primary_context(0))\n"
        "there.launch(FILL, LaunchConfig.linear(1, 32), (256, 1), 0)\n"
    )
    _, calls = run(library, tmp_path, code)
    assert [call.split()[0] for call in calls[-3:]] == ["cuCtxPopCurrent", "cuCtxPushCurrent", "cuLaunchKernel"]


def test_capture_ids(library: Path, tmp_path: Path) -> None:
    printed, _ = run(library, tmp_path, "print(driver.get().capture_id(7), driver.get().capture_id(8))")
    assert printed == "41 0"


QUEUE = (
    "from helpers.gpu_queue import GpuQueue\n"
    "import ctypes\n"
    "with GpuQueue(0) as queue:\n"
    "    data, made, nothing = queue.upload(bytes(range(100))), queue.empty(7), queue.upload(b'')\n"
    "    queue.launch(FILL, LaunchConfig.linear(1, 32), data.address, 9)\n"
    "    assert queue.launcher.launches == [('fill', LaunchConfig.linear(1, 32))]\n"
    "    assert queue.download(data) == bytes(range(100)) and queue.download(data, 2) == b'\\0\\1'\n"
    "    assert queue.download(made) == b'\\xa5' * 7 and queue.download(nothing) == b''\n"
    "    assert queue.download(queue.zeros(300)) == bytes(300)\n"
    "    ctypes.memset(made.address + BEYOND, 1, 1)\n"
)


def test_the_queue_of_the_tests(library: Path, tmp_path: Path) -> None:
    where = f"import sys; sys.path.insert(0, {str(SOURCE.parents[1])!r})\n"
    _, calls = run(library, tmp_path, where + QUEUE.replace("BEYOND", "6"))
    assert calls[-2:] == ["cuStreamDestroy 51", "cuCtxPopCurrent 100a"]
    assert any("stream 51" in call for call in calls)
    beyond = (
        QUEUE.replace("BEYOND", "7").replace("with GpuQueue(0)", "try:\n  with GpuQueue(0)").replace("\n  ", "\n   ")
    )
    printed, calls = run(library, tmp_path, where + beyond + "except AssertionError as error: print(error)")
    assert "a write beyond the buffer" in printed
    assert calls[-1] == "cuCtxPopCurrent 100a"


CAUGHT = (
    "try: launcher.for_device(0).launch(FILL, LaunchConfig.linear(1, 32), (256, 1), 0)\n"
    "except Exception as error: print(type(error).__name__, error)\n"
    "try: print(driver.get().current_context())\n"
    "except Exception: pass\n"
)


@pytest.mark.parametrize(
    ("call", "code", "expected"),
    [
        ("cuInit", 100, "GpuNotFoundError expected an NVIDIA GPU"),
        ("cuInit", 999, "GpuDriverError expected NVIDIA's driver to start, got CUDA_ERROR_UNKNOWN"),
        ("cuModuleLoadData", 209, "KernelBuildError expected a binary that the driver loads"),
        ("cuModuleLoadData", 2, "KernelLaunchError expected cuModuleLoadData to succeed, got CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuModuleGetFunction", 500, 'KernelBuildError expected an extern "C" entry point fill'),
        ("cuLaunchKernel", 1, "KernelLaunchError fill with LaunchConfig"),
        ("cuLaunchKernel", 700, "CUDA_ERROR_ILLEGAL_ADDRESS (700); it may come from work enqueued before"),
    ],
)
def test_failures(library: Path, tmp_path: Path, call: str, code: int, expected: str) -> None:
    printed, _ = run(library, tmp_path, CAUGHT, STANDIN_FAIL=call, STANDIN_CODE=str(code))
    assert expected in printed
    assert call == "cuInit" or printed.endswith("\n0")  # the thread's context is as it was


def test_all_methods_are_those_of_the_other_stand_in() -> None:
    from helpers.driver_standin import StandIn

    methods = {name for name in vars(Driver) if not name.startswith("_")}
    assert methods - {"capture_id"} <= set(dir(StandIn))
