"""Tiles decode to the same bits as the reference, whatever the order of lanes; damaged parts do no harm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles import decode, naive
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from bitforbit.errors import CorruptTensorError, UsageError
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue, run_everywhere
from cuda_shim.emulation import queue as emulated_queue
from helpers.device_tiles import DeviceTiles
from helpers.tile_cases import cases, gaussian, with_exponents

CASES = cases()
H200 = DeviceProperties("H200", (9, 0), 132, 50 << 20, 227 << 10)
ONE_MULTIPROCESSOR = DeviceProperties("small", (8, 0), 1, 1 << 20, 100 << 10)


@pytest.mark.parametrize("name", CASES)
def test_matrices_come_back_bit_for_bit(queue: Any, name: str) -> None:
    words = CASES[name]
    np.testing.assert_array_equal(DeviceTiles.of(queue, words).decode(), words)


def test_a_large_matrix(queue: Any) -> None:
    words = gaussian(128, 4096, 11)
    np.testing.assert_array_equal(DeviceTiles.of(queue, words).decode(), words)


@pytest.mark.parametrize("name", ["gaussian-17x65", "gaussian-40x72", "gaussian-1x1", "specials", "most-escape"])
def test_memory_and_races(name: str) -> None:
    words = CASES[name]
    ids = np.array([0, len(words) - 1, -1, len(words), 0], np.int64)
    whole, part, (rows, status) = run_everywhere(
        lambda queue: (
            DeviceTiles.of(queue, words).decode(),
            DeviceTiles.of(queue, words).decode(len(words) // 3, len(words) // 2 + 1),
            DeviceTiles.of(queue, words).rows(ids),
        )
    )
    np.testing.assert_array_equal(whole, words)
    np.testing.assert_array_equal(part, words[len(words) // 3 : len(words) // 2 + 1])
    np.testing.assert_array_equal(rows[[0, 1, 4]], words[ids[[0, 1, 4]]])
    assert (rows[2:4].any(), status) == (False, 2)


@pytest.mark.parametrize("cols", [64, 72, 331])
def test_ranges_of_rows(queue: Any, cols: int) -> None:
    words = with_exponents(70, cols, [*range(118, 126)] * 9 + [3, 250], cols)
    tiles = DeviceTiles.of(queue, words)
    for begin, end in [(0, 1), (0, 16), (3, 5), (15, 17), (16, 32), (9, 70), (69, 70), (33, 33)]:
        np.testing.assert_array_equal(tiles.decode(begin, end), words[begin:end])


@pytest.mark.parametrize("seed", [0, 3])
def test_runs_of_tiles(seed: int) -> None:
    """On a small device a warp takes several tiles; the last run of a stripe is shorter."""
    words = gaussian(48, 64 * 31, 5)
    layout = TileLayout(*words.shape)
    assert 1 < decode.run_tiles(layout, layout.stripes, ONE_MULTIPROCESSOR) < decode.LONGEST_RUN
    queue = EmulatedQueue(EmulatedLauncher(seed, properties=ONE_MULTIPROCESSOR))
    np.testing.assert_array_equal(DeviceTiles.of(queue, words).decode(), words)


def test_launch_configurations() -> None:
    """A wave of warps where the matrix allows it; longer runs where there is more than one."""
    plans = [
        decode.decode_plan(TileLayout(rows, cols), 0, rows, H200)
        for rows, cols in [(1, 1), (1024, 4096), (4096, 4096), (28672, 8192), (7, 9)]
    ]
    assert [(plan.run_tiles, plan.config.grid[0]) for plan in plans] == [(1, 1), (1, 512), (4, 512), (8, 3584), (1, 1)]
    assert [plan.kernel.name for plan in plans[2:]] == ["tiles_decode", "tiles_decode", "tiles_decode_any"]
    assert decode.rows_config(TileLayout(128_256, 4096), 5).grid[0] == 5


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("name", ["gaussian-33x1000", "gaussian-17x65", "gaussian-5x331", "most-escape", "65-escaped"])
def test_rows_by_id(queue: Any, name: str, kind: type) -> None:
    words = CASES[name]
    ids = np.array([0, len(words) - 1, 0, *np.random.default_rng(0).integers(0, len(words), 20)], kind)
    got, status = DeviceTiles.of(queue, words).rows(ids)
    np.testing.assert_array_equal(got, words[ids])
    assert status == 0


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_ids_outside_give_zeros_and_a_status(queue: Any, kind: type) -> None:
    words = gaussian(20, 600)
    tiles = DeviceTiles.of(queue, words)
    wrong = [-1, 20, np.iinfo(kind).max, np.iinfo(kind).min]
    for ids in ([3, *wrong, 4], wrong):
        got, status = tiles.rows(np.array(ids, kind))
        for row, index in zip(got, ids, strict=True):
            np.testing.assert_array_equal(row, words[index] if 0 <= index < 20 else np.zeros(600, np.uint16))
        assert status == 2
    assert tiles.rows(np.array(wrong, kind), with_status=False)[1] == 0


def test_nothing_is_launched_for_nothing() -> None:
    queue = EmulatedQueue()
    tiles = DeviceTiles.of(queue, gaussian(20, 60))
    assert tiles.decode(7, 7).shape == (0, 60)
    assert tiles.rows(np.zeros(0, np.int64))[0].shape == (0, 60)
    assert not queue.launcher.launches


@pytest.mark.parametrize("part", PARTS)
def test_damaged_parts_change_weights_only(part: str) -> None:
    """Base and sizes out of range, positions anywhere: the result is garbage, but there is one, of what was given."""
    words = with_exponents(33, 200, [*range(118, 126)] * 9 + [3, 250], 1)
    random = np.random.default_rng(0)
    for wide_entries in (False, True):
        parts = naive.pack(words)
        parts[part] = random.integers(0, 256, parts[part].size, np.uint8)
        if wide_entries:
            parts["header"] = parts["header"].copy()
            parts["header"][68:72].view("<u4")[0] = 4
        tiles = DeviceTiles(emulated_queue("memory"), parts, 33, 200)
        assert tiles.decode().shape == (33, 200)
        assert tiles.rows(np.arange(0, 33, 7))[1] == 0


@pytest.mark.parametrize("lie", [[0, 0xFFFFFFFF], [0xFFFFFFFF, 0], [7, 7], [0xFFFFFF00, 0xFFFFFFF0], [3, 2]])
def test_offsets_that_lie(lie: list[int]) -> None:
    parts = naive.pack(gaussian(16, 64, 2))
    parts["offsets"] = np.array([*lie, 0, 0], "<u4").view(np.uint8)
    tiles = DeviceTiles(emulated_queue("memory"), parts, 16, 64)
    assert tiles.decode().shape == (16, 64)
    assert tiles.rows(np.arange(3))[1] == 0


def test_arguments_that_are_refused() -> None:
    queue, layout = EmulatedQueue(), TileLayout(20, 60)
    parts = [(256, layout.tiles_bytes), (256, 16), (256, layout.offsets_bytes), (256, 128)]
    for begin, end in [(-1, 3), (0, 21), (5, 4)]:
        with pytest.raises(UsageError, match="rows within 0 to 20"):
            decode.decode(queue, parts, layout, begin, end, 256)
    for i, nbytes in [(0, 1408), (1, 0), (1, 24), (2, 32), (3, 64)]:
        wrong = list(parts)
        wrong[i] = (256, nbytes)
        with pytest.raises(CorruptTensorError, match=f"parts? .*{PARTS[i]}.*got.*{nbytes}"):
            decode.decode(queue, wrong, layout, 0, 20, 256)
    for misaligned in ([(264, parts[0][1]), *parts[1:]], [*parts[:3], (258, 128)]):
        with pytest.raises(UsageError, match="multiples of 16"):
            decode.decode(queue, misaligned, layout, 0, 20, 256)
    with pytest.raises(UsageError, match="multiples of 16"):
        decode.decode(queue, parts, layout, 0, 20, 258)
    with pytest.raises(UsageError, match="4 or 8 bytes"):
        decode.rows(queue, parts, layout, 256, 2, 1, 256)
    with pytest.raises(UsageError, match="fewer at once"):
        decode.rows(queue, parts, layout, 256, 8, -1, 256)
    with pytest.raises(UsageError, match="2\\^31"):
        decode.decode_plan(TileLayout(1 << 31, 1), 0, 1, H200)
    assert not queue.launcher.launches


def test_more_weights_than_32_bits_count() -> None:
    """The last rows of a matrix of 2^32 weights and some: 6 GB of address space, nearly all of it untouched."""
    layout = TileLayout((1 << 26) + 24, 64)
    words = with_exponents(24, 64, [*range(118, 126)] * 9 + [3, 250], 4)
    last = naive.pack(words)
    tiles = np.zeros(layout.tiles_bytes, np.uint8)
    tiles[-last["tiles"].size :] = last["tiles"]
    offsets = np.zeros(layout.offsets_bytes // 4, np.uint32)
    offsets[layout.tiles - 2 : layout.tiles + 1] = last["offsets"].view("<u4")[:3]
    arrays = (tiles, last["escapes"], offsets, last["header"])
    parts = [(array.ctypes.data, array.nbytes) for array in arrays]
    assert layout.rows * layout.cols > 1 << 32
    queue = EmulatedQueue()
    out = queue.empty(words.nbytes)
    decode.decode(queue, parts, layout, layout.rows - 24, layout.rows, out.address)
    np.testing.assert_array_equal(out.array.view(np.uint16).reshape(words.shape), words)
    ids = np.array([layout.rows - 1, layout.rows - 24], np.int32)
    decode.rows(queue, parts, layout, ids.ctypes.data, 4, 2, out.address)
    np.testing.assert_array_equal(out.array.view(np.uint16).reshape(words.shape)[:2], words[[23, 0]])
