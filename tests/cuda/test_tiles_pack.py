"""Matrices packed on the device are, byte for byte, what the reference packs."""

from __future__ import annotations

import numpy as np
import pytest

from bitforbit.codecs.base import Bytes
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles import naive, pack
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from bitforbit.errors import UsageError
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from helpers.tile_cases import SHAPES, Words, cases, gaussian

CASES = cases()


def packed(queue: EmulatedQueue, words: Words) -> dict[str, Bytes] | None:
    data = queue.upload(words.tobytes())
    parts = pack.pack(queue, data.address, *words.shape)
    if parts is None:
        return None
    assert tuple(parts) == PARTS
    return {name: np.frombuffer(queue.download(part), np.uint8) for name, part in parts.items()}


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_the_reference(name: str, seed: int) -> None:
    words = CASES[name]
    expected = naive.pack(words)
    got = packed(EmulatedQueue(EmulatedLauncher(seed)), words)
    if sum(part.size for part in expected.values()) >= words.nbytes:
        assert got is None
        return
    assert got is not None
    for part in PARTS:
        assert np.array_equal(got[part], expected[part]), part


def test_cases_are_there_for_both_answers() -> None:
    sizes = {name: sum(p.size for p in naive.pack(words).values()) / words.nbytes for name, words in CASES.items()}
    assert {name for name, size in sizes.items() if size >= 1} >= {"all-patterns", "most-escape", "one-weight"}
    assert {name for name, size in sizes.items() if size < 1} >= {
        "65-escaped",
        "64-escaped",
        "gaussian-64x512",
        "gaussian-47x449",
        "specials",
    }


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_escapes_of_a_matrix_too_small_to_gain(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison where the answer would be None: tiny matrices, and all 65,536 patterns."""
    monkeypatch.setattr(TileLayout, "nbytes", lambda *_: 0)
    for words in (gaussian(rows, cols), CASES["all-patterns"], CASES["most-escape"]):
        got = packed(EmulatedQueue(), words)
        assert got is not None
        for part, expected in naive.pack(words).items():
            assert np.array_equal(got[part], expected), part


@pytest.mark.parametrize("count", [1, 255, 256, 257, 4095, 4096, 4097, 70_000, 4096 * 300 + 5])
def test_running_sum(count: int) -> None:
    counts = np.random.default_rng(count).integers(0, 1025, count).astype(np.uint32)
    queue = EmulatedQueue(EmulatedLauncher(count))
    buffer = queue.upload(counts.tobytes() + bytes(4))
    pack.running_sum(queue, buffer.address, count)
    assert np.array_equal(buffer.array.view("<u4"), np.concatenate([[0], np.cumsum(counts, dtype=np.uint64)]))


def test_histogram_launches() -> None:
    hopper = DeviceProperties("H", (9, 0), 132, 50 << 20, 227 << 10)
    assert pack.histogram_config(1, hopper).grid == (1, 1, 1)
    assert pack.histogram_config(1 << 30, hopper).grid == (1056, 1, 1)
    assert pack.histogram_config(1 << 44, hopper).grid == (1 << 13, 1, 1)  # a bin never overflows


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (-1, 5), (1 << 31, 1), (1, 1 << 31), (1 << 30, 1 << 20)])
def test_matrices_that_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="expected a matrix"):
        pack.pack(EmulatedQueue(), 256, *shape)
