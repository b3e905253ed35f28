"""Copies under way, mbarriers and tensor cores in the emulation: results, and that what is missing shows."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cuda_shim
from bitforbit.cuda.kernel import U32, Kernel, LaunchConfig, Pointer
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue, EmulationError, run_everywhere

SELFTEST = Path(cuda_shim.__file__).parent / "selftest"
TILE = 128


def sums(name: str, threads: int, words: np.ndarray, **macros: int) -> bytes:
    defines = tuple((key, str(value)) for key, value in macros.items())
    kernel = Kernel(name, str(SELFTEST / "async.cu"), (Pointer, U32, Pointer), defines)

    def run(queue: EmulatedQueue) -> bytes:
        given, out = queue.upload(words.tobytes()), queue.empty(4 * -(-words.size // TILE))
        queue.launch(kernel, LaunchConfig.linear(1, threads), given.address, words.size, out.address)
        return queue.download(out)

    return run_everywhere(run)


def expected(words: np.ndarray) -> bytes:
    padded = np.concatenate([words, np.zeros(-words.size % TILE, np.uint32)])
    return padded.reshape(-1, TILE).sum(1, dtype=np.uint32).tobytes()


@pytest.mark.parametrize("n", [1, TILE - 1, TILE, 3 * TILE, 7 * TILE + 5])
def test_tiles_staged_by_threads(n: int) -> None:
    words = np.random.default_rng(n).integers(0, 2**32, n, np.uint32)
    assert sums("sum_staged", TILE, words) == expected(words)


@pytest.mark.parametrize("tiles", [1, 3, 8])
def test_tiles_staged_by_the_copy_engine(tiles: int) -> None:
    words = np.random.default_rng(tiles).integers(0, 2**32, tiles * TILE, np.uint32)
    assert sums("sum_bulk", 96, words) == expected(words)


@pytest.mark.parametrize(
    ("name", "threads", "macros", "message"),
    [
        ("sum_staged", TILE, {"WAIT": 3}, "barrier or a fence is missing|race"),
        ("sum_staged", TILE, {"AGAIN": 0}, "barrier or a fence is missing|race"),
        ("sum_bulk", 96, {"EMPTY": 0}, "barrier or a fence is missing|race|more arrivals"),
        ("sum_bulk", 96, {"BYTES": 1024}, "deadlock.*mbarrier_wait"),
        ("sum_bulk", 96, {"BYTES": 0}, "more arrivals|deadlock|barrier or a fence is missing|race"),
    ],
)
def test_what_is_missing_shows(name: str, threads: int, macros: dict[str, int], message: str) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 9 * TILE, np.uint32)
    with pytest.raises(EmulationError, match=message):
        sums(name, threads, words, **macros)


@pytest.mark.parametrize("by_ldmatrix", [0, 1])
def test_fragments_of_the_tensor_cores(by_ldmatrix: int) -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(-9, 9, (16, 16)).astype(ml_dtypes.bfloat16)
    b = rng.integers(-9, 9, (16, 8)).astype(ml_dtypes.bfloat16)
    c = rng.integers(-9, 9, (16, 8)).astype(np.float32)
    assert product(a, b, c, by_ldmatrix) == (a.astype(np.float32) @ b.astype(np.float32) + c).tobytes()


def product(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, by_ldmatrix: int = 0, rounds_each: bool | None = None
) -> bytes:
    kernel = Kernel("multiply", str(SELFTEST / "mma.cu"), (Pointer, Pointer, Pointer, U32))

    def run(queue: EmulatedQueue) -> bytes:
        left, right, out = queue.upload(a.tobytes()), queue.upload(b.tobytes()), queue.upload(c.tobytes())
        queue.launch(kernel, LaunchConfig.linear(1, 32), left.address, right.address, out.address, by_ldmatrix)
        return queue.download(out)

    if rounds_each is None:
        return run_everywhere(run)
    return run(EmulatedQueue(EmulatedLauncher(mma_rounds_each=rounds_each)))


def test_rounding_of_the_tensor_cores_is_a_choice() -> None:
    a = np.zeros((16, 16), ml_dtypes.bfloat16)
    a[:, :3] = [2.0**24, 1, 1]
    b, c = np.ones((16, 8), ml_dtypes.bfloat16), np.zeros((16, 8), np.float32)
    assert set(np.frombuffer(product(a, b, c, rounds_each=False), np.float32)) == {2.0**24 + 2}
    assert set(np.frombuffer(product(a, b, c, rounds_each=True), np.float32)) == {2.0**24}
