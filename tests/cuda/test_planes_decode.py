"""The GPU decoder of planes against the CPU's and the naive one, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitforbit import dtypes
from bitforbit.codecs.base import EncodedTensor
from bitforbit.codecs.planes import naive
from bitforbit.codecs.planes.layout import PLANE_WIDTHS, Layout
from bitforbit.cuda.planes import decode
from bitforbit.errors import CorruptTensorError, UsageError
from cuda_shim.emulation import queue as checked_queue
from cuda_shim.emulation import run_everywhere
from helpers.device_planes import CODEC, Case, encoded, hostile_bytes

KINDS = [(kind, False) for kind in PLANE_WIDTHS] + [("BF16", True)]
STYLES = ["random", "trained", "constant", "far", "zeros"]
# One row, one column, edge columns, short blocks, fewer columns than a group, several chunks in a block.
SHAPES = [(1, 1), (1, 63), (1, 64), (1, 65), (2, 3), (16, 64), (17, 130), (33, 200), (5, 1000), (40, 576), (1, 9000)]


@pytest.mark.parametrize(("kind", "wide"), KINDS)
def test_whole_matrices(queue: Any, kind: str, wide: bool) -> None:
    for number, (rows, cols) in enumerate(SHAPES):
        for style in (STYLES[number % 5], STYLES[(number + 2) % 5]):
            data = hostile_bytes(kind, wide, rows * cols, number, style)
            case = Case(queue, encoded(data, kind, wide, rows, cols), wide)
            assert case.decode(0, rows) == data.tobytes(), (rows, cols, style)
            assert case.status() == 0


@pytest.mark.parametrize(("kind", "wide"), KINDS)
def test_no_races_and_no_access_outside_of_buffers(kind: str, wide: bool) -> None:
    for rows, cols, style in ((17, 200, "zeros"), (18, 576, "random"), (1, 65, "constant")):
        data = hostile_bytes(kind, wide, rows * cols, 9, style)
        tensor = encoded(data, kind, wide, rows, cols)

        def run(queue: Any, tensor: EncodedTensor = tensor, rows: int = rows) -> tuple[bytes, bytes, bytes, int]:
            case = Case(queue, tensor, wide)
            ids = np.array([rows - 1, 0, rows, -1, 0], np.int64)
            return case.decode(0, rows), case.decode(rows // 2, rows), case.rows(ids), case.status()

        whole, half, chosen, status = run_everywhere(run)
        row_bytes = data.size // rows
        assert whole == data.tobytes()
        assert half == whole[rows // 2 * row_bytes :]
        assert chosen == whole[-row_bytes:] + whole[:row_bytes] + bytes(2 * row_bytes) + whole[:row_bytes]
        assert status == 2


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_every_pattern_of_two_bytes(queue: Any, kind: str) -> None:
    words = np.arange(1 << 16, dtype="<u2")
    for order in (words, np.random.default_rng(1).permutation(words)):
        data = np.frombuffer(order.tobytes(), np.uint8)
        assert Case(queue, encoded(data, kind, False, 256, 256)).decode(0, 256) == data.tobytes()


@pytest.mark.parametrize("kind", PLANE_WIDTHS)
def test_parts_of_the_naive_encoder_with_tables_of_its_own(queue: Any, kind: str) -> None:
    """A table per block, and few enough ranks that every level and the raw exponents are used."""
    rows, cols = 41, 200
    layout = Layout(kind, rows, cols, 16)
    float_layout = dtypes.FLOAT_LAYOUTS[kind]
    data = hostile_bytes(kind, False, rows * cols, 5, "random")
    words = data.view(f"<u{float_layout.itemsize}").astype(np.uint32)
    top = 1 << float_layout.exponent_bits
    tables = [[(7 * rank + 3 * block) % top for rank in range(9)] for block in range(3)]
    parts = naive.encode(words, layout, tables)
    np.testing.assert_array_equal(naive.decode(parts, layout), words)
    case = Case.of_parts(queue, parts, layout)
    assert case.decode(0, rows) == data.tobytes()
    assert case.status() == 0


@pytest.mark.parametrize("rows_per_table", [16, 48, 1 << 40])
def test_tables_by_rows(queue: Any, rows_per_table: int) -> None:
    data = hostile_bytes("BF16", False, 100 * 80, 1, "zeros")
    case = Case(queue, encoded(data, "BF16", False, 100, 80, rows_per_table))
    assert case.decode(0, 100) == data.tobytes()


@pytest.mark.parametrize(("kind", "wide", "cols"), [("BF16", False, 72), ("F8_E4M3", False, 67), ("F32", False, 66)])
def test_any_row_range(queue: Any, kind: str, wide: bool, cols: int) -> None:
    rows = 37
    data = hostile_bytes(kind, wide, rows * cols, 2, "trained")
    case = Case(queue, encoded(data, kind, wide, rows, cols), wide)
    edges = [0, 1, 15, 16, 17, 32, 36, 37]
    for begin in edges:
        for end in edges:
            if begin <= end:
                expected = data[begin * case.row_bytes : end * case.row_bytes].tobytes()
                assert case.decode(begin, end) == expected, (begin, end)


@pytest.mark.parametrize("cols", [65, 66, 68, 72])
def test_rows_at_every_alignment(queue: Any, cols: int) -> None:
    for kind, wide in KINDS:
        data = hostile_bytes(kind, wide, 19 * cols, cols, "trained")
        case = Case(queue, encoded(data, kind, wide, 19, cols), wide)
        assert case.decode(1, 19) == data[case.row_bytes :].tobytes(), kind


@pytest.mark.parametrize("shift", [1, 2, 4, 8, 16])
def test_outputs_at_every_alignment(queue: Any, shift: int) -> None:
    for kind, wide in KINDS:
        data = hostile_bytes(kind, wide, 19 * 128, shift, "trained")
        case = Case(queue, encoded(data, kind, wide, 19, 128), wide)
        if shift % (case.row_bytes // 128):
            continue
        room = queue.zeros(data.size + 64)
        decode.decode(
            queue, case.parts, case.layout, wide, 0, 19, room.address + shift, case.workspace.address
        )  # fmt: skip
        assert queue.download(room) == bytes(shift) + data.tobytes() + bytes(64 - shift), kind


@pytest.mark.parametrize("id_type", [np.int32, np.int64])
@pytest.mark.parametrize(("kind", "wide"), KINDS)
def test_rows_by_id(queue: Any, kind: str, wide: bool, id_type: type) -> None:
    for cols in (64, 133):
        data = hostile_bytes(kind, wide, 35 * cols, cols, "zeros")
        case = Case(queue, encoded(data, kind, wide, 35, cols), wide)
        matrix = data.reshape(35, -1)
        ids = np.array([34, 0, 0, 16, 15, 34, 33, 7], id_type)
        assert case.rows(ids) == matrix[ids].tobytes()
        assert case.rows(ids[:0]) == b""
        assert case.status() == 0
        for bad in (-1, 35, np.iinfo(id_type).max, np.iinfo(id_type).min):
            ids[3] = bad
            expected = matrix[np.where(ids == bad, 0, ids)]
            expected[3] = 0
            case.word = queue.zeros(4)
            assert case.rows(ids) == expected.tobytes()
            assert case.status() == 2


def test_more_blocks_than_one_launch_takes(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_GRID_X", 2)
    monkeypatch.setattr(decode, "MAX_GRID_Y", 2)
    data = hostile_bytes("BF16", False, 120 * 70, 3, "trained")
    case = Case(queue, encoded(data, "BF16", False, 120, 70))
    assert case.decode(20, 119) == data[20 * 140 : 119 * 140].tobytes()
    assert case.rows(np.arange(5)) == data[: 5 * 140].tobytes()
    assert case.status() == 0


def test_more_blocks_than_threads_scan_at_once(queue: Any) -> None:
    rows = 16 * 1100 + 3
    data = hostile_bytes("F8_E5M2", False, rows, 3, "random")
    case = Case(queue, encoded(data, "F8_E5M2", False, rows, 1))
    assert case.decode(rows - 100, rows) == data[-100:].tobytes()
    assert case.status() == 0


def test_more_chunks_than_threads_scan_at_once(queue: Any) -> None:
    cols = 4096 * 258 + 5
    data = hostile_bytes("F8_E4M3", False, cols, 3, "trained")
    case = Case(queue, encoded(data, "F8_E4M3", False, 1, cols))
    assert case.decode(0, 1) == data.tobytes()
    assert case.status() == 0


@pytest.mark.parametrize("part", ["code", "digits", "tails"])
def test_damage_is_noticed_where_the_cpu_notices_it(queue: Any, part: str) -> None:
    rows, cols = 37, 150
    agreed = set()
    for seed in range(24):
        rng = np.random.default_rng(seed)
        data = hostile_bytes("BF16", False, rows * cols, seed, "zeros")
        good = encoded(data, "BF16", False, rows, cols, 16)
        parts = {name: bytes_.copy() for name, bytes_ in good.parts.items()}
        at = rng.integers(0, parts[part].size, int(rng.integers(1, 6)))
        parts[part][at] ^= rng.integers(1, 256, at.size).astype(np.uint8)
        case = Case.of_parts(queue, parts, Layout.from_config(good.config, "BF16", (rows, cols)))
        out = np.empty_like(data)
        try:
            CODEC.decode(EncodedTensor("planes", 1, "BF16", (rows, cols), good.config, parts), out, None, 1)
        except CorruptTensorError:
            assert case.status() == 1
            case.decode(0, rows)
            agreed.add(True)
        else:
            assert case.status() == 0
            assert case.decode(0, rows) == out.tobytes()
            agreed.add(False)
    assert True in agreed


def test_damage_leads_to_no_access_outside_of_buffers() -> None:
    rows, cols = 19, 150
    for seed in range(12):
        rng = np.random.default_rng(seed)
        kind = list(PLANE_WIDTHS)[seed % 2 * 3]
        good = encoded(hostile_bytes(kind, False, rows * cols, seed, "zeros"), kind, False, rows, cols, 16)
        parts = {name: part.copy() for name, part in good.parts.items()}
        name = ("code", "digits", "tails")[seed % 3]
        parts[name][:] = 0xFF if seed < 3 else rng.integers(0, 256, parts[name].size)
        case = Case.of_parts(checked_queue("memory"), parts, Layout.from_config(good.config, kind, (rows, cols)))
        case.decode(0, rows)
        case.rows(np.array([0, rows - 1], np.int32))
        assert case.status() == 1, (seed, name)


def test_counts_that_contradict_the_digits(queue: Any) -> None:
    data = hostile_bytes("BF16", False, 40 * 100, 0, "trained")
    good = encoded(data, "BF16", False, 40, 100, 64)
    layout = Layout.from_config(good.config, "BF16", (40, 100))
    changes = {
        "more level-2 digits than weights": ("code", 16 + 2, 0xFF),
        "fewer level-2 digits than 3s": ("code", 16, int(good.parts["code"][16]) ^ 1),
        "more raw exponents than memory": ("code", 16 + 11, 0xFF),
        "a 3 that has no digit behind it": ("digits", 0, 0xFF),
    }
    for cause, (name, at, value) in changes.items():
        parts = {key: part.copy() for key, part in good.parts.items()}
        parts[name][at] = value
        assert Case.of_parts(queue, parts, layout).status() == 1, cause
    short = {**good.parts, "tails": good.parts["tails"][:-64]}
    assert Case.of_parts(queue, short, layout).status() == 1


@pytest.mark.parametrize("name", ["code", "digits", "sign_mantissa"])
def test_parts_of_other_lengths_are_refused(queue: Any, name: str) -> None:
    data = hostile_bytes("BF16", False, 40 * 100, 0, "trained")
    good = encoded(data, "BF16", False, 40, 100)
    layout = Layout.from_config(good.config, "BF16", (40, 100))
    with pytest.raises(CorruptTensorError, match=name):
        Case.of_parts(queue, {**good.parts, name: good.parts[name][:-64]}, layout)


def test_what_cannot_be_carried_out(queue: Any) -> None:
    data = hostile_bytes("F16", False, 40 * 100, 0, "trained")
    case = Case(queue, encoded(data, "F16", False, 40, 100))
    out, space, layout = 1 << 12, case.workspace.address, case.layout
    decode.prepare(queue, case.parts, layout, space)
    with pytest.raises(UsageError, match="41"):
        decode.decode(queue, case.parts, layout, False, 0, 41, out, space)
    with pytest.raises(UsageError, match="widened"):
        decode.decode(queue, case.parts, layout, True, 0, 40, out, space)
    with pytest.raises(UsageError, match="output"):
        decode.decode(queue, case.parts, layout, False, 0, 40, out + 1, space)
    with pytest.raises(UsageError, match="workspace"):
        decode.decode(queue, case.parts, layout, False, 0, 40, out, space + 8)
    with pytest.raises(UsageError, match="4 or 8"):
        decode.rows(queue, case.parts, layout, False, 0, 2, 1, out, space)
    with pytest.raises(UsageError, match="part 'code'"):
        decode.prepare(queue, [(4, case.parts[0][1]), *case.parts[1:]], layout, space)
    with pytest.raises(CorruptTensorError, match=r"below 2\^32"):
        decode.workspace_bytes(Layout("BF16", 16, 1 << 28, 16))
