"""Tiles decode to the same bits as the reference, whatever the order of lanes; damaged parts do no harm."""

from __future__ import annotations

import numpy as np
import pytest

from bitforbit.codecs.base import Bytes
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles import decode, naive
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from bitforbit.errors import CorruptTensorError, UsageError
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue, HostBuffer
from helpers.tile_cases import Words, cases, gaussian, with_exponents

CASES = cases()
SEEDS = (0, 1, 7)
ONE_MULTIPROCESSOR = DeviceProperties("small", (8, 0), 1, 1 << 20, 100 << 10)


class OnDevice:
    """Parts in the emulation's device memory."""

    def __init__(self, parts: dict[str, Bytes], queue: EmulatedQueue) -> None:
        self.buffers = [queue.upload(parts[name].tobytes()) for name in PARTS]
        self.parts = [(b.address, b.nbytes) for b in self.buffers]


def decoded(
    queue: EmulatedQueue, parts: dict[str, Bytes], layout: TileLayout, begin: int = 0, end: int | None = None
) -> Words:
    end = layout.rows if end is None else end
    device = OnDevice(parts, queue)
    out = queue.empty(2 * (end - begin) * layout.cols)
    decode.decode(queue, device.parts, layout, begin, end, out.address)
    return out.array.view(np.uint16).reshape(end - begin, layout.cols)


def by_id(
    queue: EmulatedQueue, parts: dict[str, Bytes], layout: TileLayout, ids: np.ndarray, status: HostBuffer | None = None
) -> Words:
    device, on_device = OnDevice(parts, queue), queue.upload(ids.tobytes())
    out = queue.empty(2 * ids.size * layout.cols)
    decode.rows(
        queue, device.parts, layout, on_device.address, ids.itemsize, ids.size, out.address,
        status.address if status else 0,
    )  # fmt: skip
    return out.array.view(np.uint16).reshape(ids.size, layout.cols)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_matrices_come_back_bit_for_bit(name: str, seed: int) -> None:
    words = CASES[name]
    queue = EmulatedQueue(EmulatedLauncher(seed))
    assert np.array_equal(decoded(queue, naive.pack(words), TileLayout(*words.shape)), words)


@pytest.mark.parametrize("cols", [64, 72, 331])
def test_ranges_of_rows(cols: int) -> None:
    words = with_exponents(70, cols, [*range(118, 126)] * 9 + [3, 250], cols)
    parts, layout, queue = naive.pack(words), TileLayout(*words.shape), EmulatedQueue()
    for begin, end in [(0, 1), (0, 16), (3, 5), (15, 17), (16, 32), (9, 70), (69, 70), (33, 33)]:
        assert np.array_equal(decoded(queue, parts, layout, begin, end), words[begin:end]), (begin, end)


def test_runs_of_tiles() -> None:
    """On a small device a warp takes several tiles; the last run of a stripe is shorter."""
    words = gaussian(48, 64 * 29, 5)
    queue = EmulatedQueue(EmulatedLauncher(3, properties=ONE_MULTIPROCESSOR))
    layout = TileLayout(*words.shape)
    assert 1 < decode.run_tiles(layout, layout.stripes, ONE_MULTIPROCESSOR) < decode.LONGEST_RUN
    assert np.array_equal(decoded(queue, naive.pack(words), layout), words)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize(
    "name", ["gaussian-33x1000", "gaussian-17x65", "gaussian-5x331", "most-escape", "65-escaped", "gaussian-1x1"]
)
def test_rows_by_id(name: str, kind: type) -> None:
    words = CASES[name]
    rows = len(words)
    ids = np.array([0, rows - 1, 0, *np.random.default_rng(0).integers(0, rows, 20)], kind)
    for seed in SEEDS:
        queue = EmulatedQueue(EmulatedLauncher(seed))
        status = queue.zeros(4)
        got = by_id(queue, naive.pack(words), TileLayout(*words.shape), ids, status)
        assert np.array_equal(got, words[ids])
        assert not status.array.any()


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_ids_outside_give_zeros_and_a_status(kind: type) -> None:
    words = gaussian(20, 600)
    queue = EmulatedQueue()
    wrong = [-1, 20, np.iinfo(kind).max, np.iinfo(kind).min]
    for ids in ([3, *wrong, 4], wrong):
        status = queue.zeros(4)
        got = by_id(queue, naive.pack(words), TileLayout(*words.shape), np.array(ids, kind), status)
        for row, index in zip(got, ids, strict=True):
            assert np.array_equal(row, words[index] if 0 <= index < 20 else np.zeros(600, np.uint16))
        assert status.array.view("<u4")[0] == 2
    by_id(queue, naive.pack(words), TileLayout(*words.shape), np.array(wrong, kind))  # without a status


def test_nothing_is_launched_for_nothing() -> None:
    words = gaussian(20, 60)
    queue = EmulatedQueue()
    assert decoded(queue, naive.pack(words), TileLayout(20, 60), 7, 7).shape == (0, 60)
    assert by_id(queue, naive.pack(words), TileLayout(20, 60), np.zeros(0, np.int64)).shape == (0, 60)
    assert not queue.launcher.launches


@pytest.mark.parametrize("part", ["tiles", "escapes", "offsets", "header"])
def test_damaged_parts_change_weights_only(part: str) -> None:
    """Offsets that lie, base and sizes out of range, positions anywhere: the result is garbage, the launch ends."""
    words = with_exponents(33, 200, [*range(118, 126)] * 9 + [3, 250], 1)
    layout = TileLayout(*words.shape)
    random = np.random.default_rng(0)
    for seed in range(4):
        parts = naive.pack(words)
        parts[part] = random.integers(0, 256, parts[part].size, np.uint8)
        if part == "header" and seed % 2:
            parts[part][68:72].view("<u4")[0] = 4
        queue = EmulatedQueue(EmulatedLauncher(seed))
        decoded(queue, parts, layout)
        by_id(queue, parts, layout, np.arange(33))


def test_arguments_that_are_refused() -> None:
    queue, layout = EmulatedQueue(), TileLayout(20, 60)
    parts = [(256, layout.tiles_bytes), (256, 16), (256, layout.offsets_bytes), (256, 128)]
    for begin, end in [(-1, 3), (0, 21), (5, 4)]:
        with pytest.raises(UsageError, match="rows within 0 to 20"):
            decode.decode(queue, parts, layout, begin, end, 256)
    for i, nbytes in [(0, 1408), (1, 0), (1, 24), (2, 32), (3, 64)]:
        wrong = list(parts)
        wrong[i] = (256, nbytes)
        with pytest.raises(CorruptTensorError, match=f"part {PARTS[i]}"):
            decode.decode(queue, wrong, layout, 0, 20, 256)
    with pytest.raises(UsageError, match="4 or 8 bytes"):
        decode.rows(queue, parts, layout, 256, 2, 1, 256)
    with pytest.raises(UsageError, match="not negative"):
        decode.rows(queue, parts, layout, 256, 8, -1, 256)
    with pytest.raises(UsageError, match="2\\^31"):
        decode.decode(queue, parts, TileLayout(1 << 31, 1), 0, 1, 256)
