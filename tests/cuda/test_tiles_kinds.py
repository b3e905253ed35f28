"""FP16 and FP8 in tiles: the kernels agree with the reference, byte for byte, and matrices come back bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitforbit.cuda.tiles import kinds, naive, pack
from bitforbit.cuda.tiles.kinds import BF16, F8_E4M3, F16, KINDS, Elements, Kind
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from bitforbit.errors import UnsupportedDtypeError
from cuda_shim.emulation import queue as emulated_queue
from cuda_shim.emulation import run_everywhere
from helpers.device_tiles import DeviceTiles
from helpers.kind_cases import NEW, NUMBERS, cases, gaussian

CASES = {f"{kind.name} {name}": (kind, matrix) for kind in NEW for name, matrix in cases(kind).items()}
each = pytest.mark.parametrize("name", CASES)
of_kinds = pytest.mark.parametrize("kind", NEW, ids=lambda kind: kind.name)


def packed(queue: Any, matrix: Elements, kind: Kind, skipped: int = 0) -> dict[str, bytes] | None:
    data = queue.upload(bytes(skipped) + matrix.tobytes())
    parts = pack.pack(queue, data.address + skipped, *matrix.shape, kind)
    return None if parts is None else {name: queue.download(part) for name, part in parts.items()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_bit_of_a_lane_has_a_place_of_its_own(kind: Kind) -> None:
    stored = naive._stored(kind)
    places = {(word, at) for *_, word, at in stored}
    assert len(places) == len(stored) == 32 * kind.lane_words
    assert places == {(word, at) for word in range(kind.lane_words) for at in range(32)}
    assert kind.tile_bytes == {"BF16": 1408, "F16": 1792, "F8_E4M3": 896}[kind.name]


def test_kinds_by_name() -> None:
    assert [kinds.of(kind.name) for kind in KINDS] == [BF16, F16, F8_E4M3]
    with pytest.raises(UnsupportedDtypeError, match="expected weights of a kind among BF16, F16, F8_E4M3"):
        kinds.of("F8_E5M2")


def test_fp8_in_registers_is_its_value() -> None:
    elements = np.arange(256, dtype=np.uint8)
    words = F8_E4M3.words(elements)
    np.testing.assert_array_equal(F8_E4M3.elements(words), elements)
    values = (words.astype(np.uint32) << 16).view(np.float32) * np.float32(2.0**120)
    np.testing.assert_array_equal(values, elements.view(NUMBERS["F8_E4M3"]).astype(np.float32))


@each
def test_matrices_come_back_bit_for_bit(queue: Any, name: str) -> None:
    kind, matrix = CASES[name]
    parts = naive.pack(matrix, kind)
    np.testing.assert_array_equal(naive.decode(parts, TileLayout(*matrix.shape, kind)), matrix)
    tiles = DeviceTiles(queue, parts, *matrix.shape, kind)
    np.testing.assert_array_equal(tiles.decode(), matrix)
    rows = len(matrix)
    for begin, end in [(0, 1), (rows // 2, rows), (rows - 1, rows)]:
        np.testing.assert_array_equal(tiles.decode(begin, end), matrix[begin:end])
    ids = np.array([0, rows - 1, rows // 2, 0], np.int64)
    np.testing.assert_array_equal(tiles.rows(ids)[0], matrix[ids])


@each
def test_packed_bytes_are_those_of_the_reference(queue: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, matrix = CASES[name]
    expected = naive.pack(matrix, kind)
    if sum(part.size for part in expected.values()) >= matrix.nbytes:
        assert packed(queue, matrix, kind) is None
        monkeypatch.setattr(TileLayout, "nbytes", lambda *_: 0)
    got = packed(queue, matrix, kind)
    assert got is not None
    for part in PARTS:
        np.testing.assert_array_equal(np.frombuffer(got[part], np.uint8), expected[part], part)


@of_kinds
@pytest.mark.parametrize("skipped", [1, 3, 7, 8])
@pytest.mark.parametrize(("rows", "cols"), [(80, 192), (79, 191)])
def test_weights_at_any_address(queue: Any, kind: Kind, rows: int, cols: int, skipped: int) -> None:
    matrix = gaussian(kind, rows, cols, skipped)
    got, expected = packed(queue, matrix, kind, skipped * kind.item_bytes), naive.pack(matrix, kind)
    assert got == {part: expected[part].tobytes() for part in PARTS}


@of_kinds
def test_ids_outside_the_matrix(queue: Any, kind: Kind) -> None:
    matrix = gaussian(kind, 20, 70)
    rows, status = DeviceTiles.of(queue, matrix, kind).rows(np.array([3, 20, -1], np.int32))
    assert (rows[0] == matrix[3]).all()
    assert not rows[1:].any()
    assert status == 2


@of_kinds
def test_memory_and_races(kind: Kind) -> None:
    matrix = cases(kind)["specials"][:31, :255]

    def run(queue: Any) -> tuple[dict[str, bytes] | None, list[Elements]]:
        tiles = DeviceTiles.of(queue, matrix, kind)
        return packed(queue, matrix, kind), [tiles.decode(3), tiles.rows(np.array([30, 0], np.int64))[0]]

    got, (rows, by_id) = run_everywhere(run)
    expected = naive.pack(matrix, kind)
    assert got == {part: expected[part].tobytes() for part in PARTS}
    np.testing.assert_array_equal(rows, matrix[3:])
    np.testing.assert_array_equal(by_id, matrix[[30, 0]])


@of_kinds
@pytest.mark.parametrize("part", PARTS)
def test_damaged_parts_do_no_harm(kind: Kind, part: str) -> None:
    matrix = cases(kind)["most-escape"]
    parts = naive.pack(matrix, kind)
    parts[part] = np.random.default_rng(0).integers(0, 256, parts[part].size, np.uint8)
    tiles = DeviceTiles(emulated_queue("memory"), parts, *matrix.shape, kind)
    assert tiles.decode().shape == matrix.shape
    assert tiles.rows(np.array([5], np.int64))[0].shape == (1, matrix.shape[1])


@pytest.mark.parametrize(
    ("kind", "scale", "bits"), [(F16, 0.02, 14.218), (F8_E4M3, 0.02, 7.032), (F8_E4M3, 84.5, 7.234)]
)
def test_bits_per_weight_of_gaussian_weights(kind: Kind, scale: float, bits: float) -> None:
    """For FP8 as they are, and scaled so that the largest of them are near 448. Sizes may shrink, never grow."""
    parts = naive.pack(gaussian(kind, 1024, 1024, 0, scale), kind)
    assert round(8 * sum(part.size for part in parts.values()) / 1024**2, 3) == bits
