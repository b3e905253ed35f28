"""Matrices packed on the device are, byte for byte, what the reference packs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitforbit.codecs.base import Bytes
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles import naive, pack
from bitforbit.cuda.tiles.kinds import BF16
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from bitforbit.errors import UsageError
from cuda_shim.emulation import EmulatedQueue, run_everywhere
from helpers.tile_cases import SHAPES, Words, cases, gaussian

CASES = cases()


def packed(queue: Any, words: Words) -> dict[str, Bytes] | None:
    data = queue.upload(words.tobytes())
    parts = pack.pack(queue, data.address, *words.shape)
    if parts is None:
        return None
    assert tuple(parts) == PARTS
    return {name: np.frombuffer(queue.download(part), np.uint8) for name, part in parts.items()}


def assert_as_the_reference(got: dict[str, Bytes] | None, words: Words) -> None:
    expected = naive.pack(words)
    assert got is not None
    for part in PARTS:
        np.testing.assert_array_equal(got[part], expected[part], part)


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_the_reference(queue: Any, name: str) -> None:
    words = CASES[name]
    got = packed(queue, words)
    if sum(part.size for part in naive.pack(words).values()) >= words.nbytes:
        assert got is None
    else:
        assert_as_the_reference(got, words)


@pytest.mark.parametrize("name", ["gaussian-47x449", "64-escaped", "65-escaped"])
def test_memory_and_races(name: str) -> None:
    assert_as_the_reference(run_everywhere(lambda queue: packed(queue, CASES[name])), CASES[name])


@pytest.mark.parametrize("skipped", range(1, 9))
@pytest.mark.parametrize(("rows", "cols"), [(80, 192), (70, 191)])
def test_weights_at_any_address(queue: Any, rows: int, cols: int, skipped: int) -> None:
    words = gaussian(rows, cols, skipped)
    data = queue.upload(bytes(2 * skipped) + words.tobytes())
    parts = pack.pack(queue, data.address + 2 * skipped, rows, cols)
    assert parts is not None
    assert_as_the_reference({name: np.frombuffer(queue.download(parts[name]), np.uint8) for name in PARTS}, words)


def test_few_weights_at_any_address(queue: Any) -> None:
    """Fewer than lie before a boundary of 16 bytes."""
    for count in range(1, 9):
        data, bins = queue.upload(bytes(6) + bytes([0x80, 0x3F]) * count), queue.zeros(2048)
        queue.launch(
            pack.BY_KIND[BF16].histogram,
            pack.histogram_config(count, queue.properties),
            data.address + 6,
            count,
            bins.address,
        )
        found = np.frombuffer(queue.download(bins), "<u8")
        assert (found[127], found.sum()) == (count, count)


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
def test_matrices_that_do_not_gain(queue: Any, rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison where the answer would be None: tiny matrices, and all 65,536 patterns."""
    monkeypatch.setattr(TileLayout, "nbytes", lambda *_: 0)
    for words in (gaussian(rows, cols), CASES["all-patterns"], CASES["most-escape"]):
        assert_as_the_reference(packed(queue, words), words)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 4095, 4096, 4097, 70_000, 4096 * 300 + 5])
def test_running_sum(queue: Any, count: int) -> None:
    counts = np.random.default_rng(count).integers(0, 1025, count).astype(np.uint32)
    buffer = queue.upload(counts.tobytes() + bytes(4))
    pack.running_sum(queue, buffer.address, count)
    expected = np.concatenate([[0], np.cumsum(counts, dtype=np.uint64)])
    np.testing.assert_array_equal(np.frombuffer(queue.download(buffer), "<u4"), expected)


def test_running_sum_without_races() -> None:
    counts = np.arange(5000, dtype=np.uint32)

    def run(queue: EmulatedQueue) -> bytes:
        buffer = queue.upload(counts.tobytes() + bytes(4))
        pack.running_sum(queue, buffer.address, counts.size)
        return queue.download(buffer)

    assert run_everywhere(run) == np.concatenate([[0], np.cumsum(counts)]).astype("<u4").tobytes()


def test_histogram_launches() -> None:
    hopper = DeviceProperties("H", (9, 0), 132, 50 << 20, 227 << 10)
    assert pack.histogram_config(1, hopper).grid == (1, 1, 1)
    assert pack.histogram_config(1 << 30, hopper).grid == (1056, 1, 1)
    assert pack.histogram_config(1 << 44, hopper).grid == (1 << 13, 1, 1)  # a bin never overflows


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (-1, 5), (1 << 31, 1), (1, 1 << 31), (1 << 30, 1 << 20)])
def test_matrices_that_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="expected a matrix"):
        pack.pack(EmulatedQueue(), 256, *shape)
