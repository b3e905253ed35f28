"""The emulation lets correct kernels pass, with the results that CUDA defines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cuda_shim
from bitforbit.cuda import sources
from bitforbit.cuda.kernel import U32, U64, Kernel, LaunchConfig, Pointer
from cuda_shim.emulation import MODES, EmulatedQueue, HostBuffer, check_memory, run_all_seeds, run_everywhere

TEXT = str(Path(cuda_shim.__file__).parent / "selftest" / "correct.cu")
SUM = Kernel("sum_words", TEXT, (Pointer, U64, Pointer))
REVERSE = Kernel("reverse", TEXT, (Pointer, Pointer))
EARLY_EXIT = Kernel("early_exit", TEXT, (Pointer, U32))
HALVES = Kernel("halves", TEXT, (Pointer,))
READ_THEN_UPDATE = Kernel("read_then_update", TEXT, (Pointer,))
COLLECTIVES = Kernel("collectives", TEXT, (Pointer, Pointer, Pointer, Pointer))


def words(queue: EmulatedQueue, buffer: HostBuffer) -> list[int]:
    return np.frombuffer(queue.download(buffer), np.uint32).tolist()


@pytest.mark.parametrize("n", [0, 1, 95, 96, 97, 5000])
def test_sum(n: int) -> None:
    data = np.random.default_rng(n).integers(0, 1000, n, np.uint32)

    def run(queue: EmulatedQueue) -> bytes:
        total, numbers = queue.zeros(8), queue.upload(data.tobytes())
        queue.launch(SUM, LaunchConfig.linear(7, 96), numbers.address, n, total.address)
        return queue.download(total)

    assert int.from_bytes(run_everywhere(run), "little") == int(data.sum())


def test_blocks_and_threads_in_two_dimensions() -> None:
    data = np.random.default_rng(0).integers(0, 256, (5, 24, 16), np.uint8)

    def run(queue: EmulatedQueue) -> bytes:
        out, rows = queue.empty(data.nbytes), queue.upload(data.tobytes())
        config = LaunchConfig((1, 5, 1), (8, 3, 1), dynamic_shared=24 * 16)
        queue.launch(REVERSE, config, rows.address, out.address)
        return queue.download(out)

    assert run_everywhere(run) == data[:, ::-1].tobytes()


@pytest.mark.parametrize("n", [1, 17, 32])
def test_lanes_that_have_exited_are_not_waited_for(n: int) -> None:
    def run(queue: EmulatedQueue) -> list[int]:
        out = queue.zeros(128)
        queue.launch(EARLY_EXIT, LaunchConfig.linear(1, 32), out.address, n)
        return words(queue, out)

    assert run_everywhere(run) == [0xAAAAAAAA & (2**n - 1)] * n + [0] * (32 - n)


def test_masks_of_half_a_warp() -> None:
    def run(queue: EmulatedQueue) -> list[int]:
        out = queue.zeros(128)
        queue.launch(HALVES, LaunchConfig.linear(1, 32), out.address)
        return words(queue, out)

    value = [3 * (lane ^ 1) if lane < 16 else 5 * (lane ^ 3) for lane in range(32)]
    assert run_everywhere(run) == [value[31 - lane] + 155 for lane in range(32)]


def test_updates_of_what_others_have_read() -> None:
    def run(queue: EmulatedQueue) -> list[int]:
        out = queue.zeros(128)
        queue.launch(READ_THEN_UPDATE, LaunchConfig.linear(1, 32), out.address)
        return words(queue, out)

    assert run_everywhere(run) == [3 * sum(range(32)) + 32 + 64] * 32


def test_collectives_and_atomics() -> None:
    value = np.random.default_rng(3).integers(0, 2**32, 32, np.uint32)
    cells = np.array([1, 2, 2**32 - 1, 5, 2**32 - 1, 7, 8, 9], np.uint32)

    def run(queue: EmulatedQueue) -> tuple[bytes, bytes, bytes]:
        out, wide = queue.zeros(32 * 64), queue.zeros(8)
        given, cell = queue.upload(value.tobytes()), queue.upload(cells.tobytes())
        addresses = (buffer.address for buffer in (given, out, cell, wide))
        queue.launch(COLLECTIVES, LaunchConfig.linear(1, 32), *addresses)
        return queue.download(out), queue.download(cell), queue.download(wide)

    out, cell, wide = run_everywhere(run)
    lane = np.arange(32)
    table = np.frombuffer(out, np.uint32).reshape(32, 16)
    np.testing.assert_array_equal(table[:, 0], value[(lane & ~7) + (lane + 5) % 8])
    np.testing.assert_array_equal(table[:, 1], value[np.where(lane >= 3, lane - 3, lane)])
    np.testing.assert_array_equal(table[:, 2], value[np.where(lane % 16 + 3 < 16, lane + 3, lane)])
    same = value[:, None] % 4 == value[None, :] % 4
    np.testing.assert_array_equal(table[:, 3], (same.astype(np.uint64) << lane.astype(np.uint64)).sum(1))
    assert set(table[:, 4]) == {value.sum(dtype=np.uint32)}
    assert set(table[:, 5]) == {value.min()}
    assert set(table[:, 6]) == {np.bitwise_or.reduce(value)}
    assert set(table[:, 7]) == {1}
    assert set(table[:, 8]) == {value.view(np.int32).max().astype(np.uint32)}
    assert np.frombuffer(cell, np.uint32).tolist() == [
        (1 + int(value.sum(dtype=np.uint64))) % 2**32,
        2 | int(np.bitwise_or.reduce(value)),
        int(np.bitwise_and.reduce(value)),
        max(5, value.max()),
        value.min(),
        7 ^ int(np.bitwise_xor.reduce(value)),
        value[7],
        9 + 32,
    ]
    assert int.from_bytes(wide, "little") == int(value.max()) << 16


def test_kernels_of_one_name_in_several_texts_stay_apart(tmp_path: Path) -> None:
    results = []
    for number in (1, 2):
        text = tmp_path / f"text{number}.cu"
        text.write_text(f'extern "C" __global__ void same(unsigned* out) {{ *out = {number} * SCALE; }}\n')
        for scale in (1, 10):
            kernel = Kernel("same", str(text), (Pointer,), (("SCALE", str(scale)),))
            results += check_memory(kernel, LaunchConfig.linear(1, 1), [np.zeros(1, np.uint32)])[0].tolist()
            queue = EmulatedQueue()
            out = queue.zeros(4)
            queue.launch(kernel, LaunchConfig.linear(1, 1), out.address)
            results += words(queue, out)
    assert results == [1, 1, 10, 10, 2, 2, 20, 20]


def test_check_memory_returns_copies() -> None:
    data, total = np.arange(100, dtype=np.uint32), np.zeros(1, np.uint64)
    after = check_memory(SUM, LaunchConfig.linear(2, 96), [data, 100, total])
    assert (after[1][0], total[0]) == (4950, 0)


def test_modes() -> None:
    seen: list[str] = []
    run_everywhere(lambda queue: seen.append(type(queue).__name__))
    assert (len(seen), seen[-1]) == (len(MODES), "CheckedQueue")
    with pytest.raises(AssertionError, match="the result with seed 1"):
        run_all_seeds(lambda queue: np.array([queue.launcher.seed]))


def test_entry_points_and_launch_bounds() -> None:
    assert sources.launch_bounds(TEXT) == {
        "sum_words": "kThreads",
        "reverse": "1024",
        "early_exit": "32",
        "halves": "32",
        "collectives": "32",
        "read_then_update": "32",
    }
    assert sources.entry_points(TEXT)[0] == "sum_words"
