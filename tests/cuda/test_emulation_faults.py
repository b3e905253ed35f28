"""Each planted fault in a kernel is reported, by the checks meant to find it and with a message that helps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cuda_shim
from bitforbit.cuda.kernel import U32, Kernel, LaunchConfig, Pointer
from cuda_shim.emulation import CheckedQueue, EmulatedLauncher, EmulatedQueue, EmulationError, queue, run_all_seeds

TEXT = str(Path(cuda_shim.__file__).parent / "selftest" / "faults.cu")


def launch(mode: str, name: str, threads: int, *arguments: str | int, dynamic: int = 0) -> bytes:
    """Arguments: "out" for 1024 bytes of output, "in" for 96 bytes of input, or a number."""
    types = {"out": Pointer, "in": Pointer}
    kernel = Kernel(name, TEXT, tuple(types.get(str(argument), U32) for argument in arguments))
    where = queue(mode)
    out, inputs = where.zeros(1024), where.upload(bytes(range(1, 97)))
    places = {"out": out.address, "in": inputs.address}
    values = [places[argument] if isinstance(argument, str) else argument for argument in arguments]
    where.launch(kernel, LaunchConfig.linear(1, threads, dynamic), *values)
    return where.download(out)


@pytest.mark.parametrize(
    ("modes", "name", "threads", "arguments", "message"),
    [
        ("memory", "global_read", 32, ("in", "out", 96), "heap-buffer-overflow"),
        ("memory", "global_write", 32, ("in", 96), "heap-buffer-overflow"),
        ("memory", "global_before", 32, ("in", "out"), "heap-buffer-overflow"),
        ("memory", "shared_read", 32, ("out",), "heap-buffer-overflow"),
        ("memory", "shift_by_width", 8, ("in", "out"), "shift exponent"),
        ("races", "no_barrier", 64, ("out",), "smem_words.*race, (written|read) without synchronisation"),
        ("races", "no_second_barrier", 64, ("out",), "race, (written|read) without synchronisation"),
        ("races", "write_after_read", 64, ("out",), "race, written without synchronisation after other threads read"),
        ("races", "no_syncwarp", 32, ("out",), "smem_words.*race, (written|read) without synchronisation"),
        ("races", "half_syncwarp", 32, ("out",), "smem_words.*race, (written|read) without synchronisation"),
        ("races", "vote_is_no_fence", 32, ("out",), "smem_words.*race, (written|read) without synchronisation"),
        ("seed 0, seed 6, races, memory", "divergent_barrier", 64, ("out",), "threads of one block meet in"),
        ("seed 0, seed 1, races, memory", "barrier_in_warp", 32, ("out",), "deadlock .* __syncthreads .*faults.cu:"),
        ("seed 0, seed 1, races, memory", "mask_without_self", 32, ("out",), "mask leaves out a lane"),
        ("seed 0, seed 1, races, memory", "mask_of_absent", 32, ("out",), "deadlock"),
        ("seed 0, seed 1, races, memory", "shuffle_from_exited", 32, ("out",), "has exited"),
        ("seed 0, seed 1, races, memory", "different_collectives", 32, ("out",), "lanes of one mask meet in"),
        ("seed 0, memory", "misaligned_load", 1, ("in", "out"), "misaligned"),
        ("seed 0, memory", "misaligned_store", 4, ("out",), "misaligned"),
        ("seed 0, memory", "misaligned_shared", 32, ("out",), "misaligned"),
        ("seed 0, races, memory", "bounded", 65, ("out",), "__launch_bounds__ 64"),
        ("seed 0", "deep_stack", 2, ("out", 7), "stack overflow"),
    ],
)
def test_fault(modes: str, name: str, threads: int, arguments: tuple[str | int, ...], message: str) -> None:
    for mode in modes.split(", "):
        with pytest.raises(EmulationError, match=f"(?s){name}: .*{message}"):
            launch(mode, name, threads, *arguments)


def test_dynamic_shared_memory_has_an_end() -> None:
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        launch("memory", "dynamic_write", 32, "out", dynamic=128)
    launch("memory", "dynamic_write", 32, "out", dynamic=132)
    with pytest.raises(EmulationError, match="the launch gives it none"):
        launch("seed 0", "dynamic_write", 32, "out")


def test_reads_of_uninitialized_shared_memory_are_reported_on_request() -> None:
    kernel = Kernel("uninitialized_shared", TEXT, (Pointer,))
    where = EmulatedQueue(EmulatedLauncher(uninitialized=True))
    out = where.zeros(1024)
    with pytest.raises(EmulationError, match="smem_words, byte 128: read before any thread of the block wrote it"):
        where.launch(kernel, LaunchConfig.linear(1, 32), out.address)
    queue("races").launch(kernel, LaunchConfig.linear(1, 32), out.address)


@pytest.mark.parametrize(
    ("name", "threads"),
    [("no_barrier", 64), ("no_syncwarp", 32), ("half_syncwarp", 32), ("uninitialized_shared", 32)],
)
def test_seeds_differ_where_results_depend_on_luck(name: str, threads: int) -> None:
    def run(where: EmulatedQueue) -> bytes:
        out = where.zeros(1024)
        where.launch(Kernel(name, TEXT, (Pointer,)), LaunchConfig.linear(1, threads), out.address)
        return where.download(out)

    with pytest.raises(EmulationError, match="a barrier or a fence is missing"):
        run_all_seeds(run)


def test_launches_that_no_device_takes() -> None:
    kernel = Kernel("bounded", TEXT, (Pointer,))
    out = EmulatedQueue().zeros(64)
    launcher = EmulatedLauncher()
    with pytest.raises(EmulationError, match="a launch of nothing"):
        launcher.launch(kernel, LaunchConfig.linear(0, 32), [out.address])
    with pytest.raises(EmulationError, match="grid too large"):
        launcher.launch(kernel, LaunchConfig((1, 65536, 1), (1, 1, 1)), [out.address])
    with pytest.raises(EmulationError, match="232449 bytes of dynamic shared memory"):
        launcher.launch(kernel, LaunchConfig.linear(1, 32, 232449), [out.address])
    with pytest.raises(EmulationError, match="expected 1 arguments, got 2"):
        launcher.launch(kernel, LaunchConfig.linear(1, 32), [out.address, 1])
    with pytest.raises(EmulationError, match="parameters of \\[8\\] bytes, not \\[4\\]"):
        launcher.launch(Kernel("bounded", TEXT, (U32,)), LaunchConfig.linear(1, 32), [1])
    with pytest.raises(EmulationError, match="does not fit"):
        launcher.launch(Kernel("global_write", TEXT, (Pointer, U32)), LaunchConfig.linear(1, 32), [out.address, 2**32])
    with pytest.raises(EmulationError, match="no entry point absent"):
        launcher.launch(Kernel("absent", TEXT, (Pointer,)), LaunchConfig.linear(1, 32), [out.address])


def test_checked_memory_must_be_the_queues_own() -> None:
    kernel = Kernel("bounded", TEXT, (Pointer,))
    array = np.zeros(64, np.uint32)
    checked = CheckedQueue()
    with pytest.raises(EmulationError, match="lies in no buffer of this queue"):
        checked.launch(kernel, LaunchConfig.linear(1, 64), array.ctypes.data)
    checked.launch(kernel, LaunchConfig.linear(1, 64), checked.lend(array))
    assert array.tolist() == [1] * 64
