"""The DFloat11 kernels give weights back bit for bit, for every kind of stream that the format distinguishes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from df11_cases import (
    OnDevice,
    Words,
    assert_decodes,
    fibonacci,
    gaussian,
    golden_units,
    last_code_in_a_block_of_its_own,
    shuffled,
    with_code_of,
    words_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitforbit.codecs.df11 import decode_unit, encode_unit, naive
from bitforbit.cuda import df11
from bitforbit.cuda.df11 import Df11Geometry
from bitforbit.cuda.df11.geometry import padded
from bitforbit.cuda.df11.prepare import lookups
from bitforbit.errors import CorruptTensorError, UsageError
from cuda_shim.emulation import EmulatedQueue, run_everywhere

ANY_QUEUE = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_weights_of_a_model(queue: Any) -> None:
    words = gaussian(50_001)
    unit = encode_unit([words])
    assert unit.num_blocks > 3
    assert_decodes(queue, unit, words)


def test_every_order_of_lanes_and_no_stray_access() -> None:
    words = gaussian(20_003, seed=1)
    unit = encode_unit([words])
    decoded = run_everywhere(lambda queue: OnDevice(queue, unit).decode(1, 20_000, offset=2, guard=0))
    np.testing.assert_array_equal(decoded[0], words[1:20_000])
    assert decoded[1] == 0


def test_more_blocks_than_run_at_once(queue: Any) -> None:
    """Then each block of threads takes several, one after the other."""
    words = gaussian(75_000 * queue.properties.multiprocessors, seed=6)
    unit = encode_unit([words])
    device = OnDevice(queue, unit)
    for begin, end in [(0, words.size), (30_011, words.size - 5)]:
        first, last = device.geometry.blocks_of(begin, end)
        assert df11.decode_config(device.geometry, last - first, queue.properties).grid[0] < last - first
        got, status = device.decode(begin, end)
        np.testing.assert_array_equal(got, words[begin:end])
        assert status == 0


def test_several_blocks_one_after_the_other_in_every_order() -> None:
    words = shuffled({120: 260_000, 121: 130_000, 122: 60_000, 90: 3})
    unit = encode_unit([words])
    assert unit.num_blocks > 16
    decoded = run_everywhere(lambda queue: OnDevice(queue, unit).decode(), ["seed 0", "seed 11", "races"])
    np.testing.assert_array_equal(decoded[0], words)
    assert decoded[1] == 0


def test_more_rows_than_run_at_once(queue: Any, words: Words) -> None:
    device = OnDevice(queue, encode_unit([words]))
    ids = np.random.default_rng(9).integers(-1, 601, 9 * queue.properties.multiprocessors)
    assert df11.rows_config(device.geometry, ids.size, queue.properties).grid[0] < ids.size
    got, status = device.rows(0, 100, 600, ids)
    inside = (ids >= 0) & (ids < 600)
    np.testing.assert_array_equal(got[inside], words.reshape(600, 100)[ids[inside]])
    assert not got[~inside].any()
    assert status == (0 if inside.all() else 2)


def test_files_of_the_official_tool(queue: Any) -> None:
    units = golden_units()
    assert len(units) == 7
    for name, unit in units.items():
        expected = naive.decode_unit(unit) if unit.num_weights < 70_000 else decode_unit(unit)
        got, status = OnDevice(queue, unit).decode()
        np.testing.assert_array_equal(got, expected, err_msg=name)
        assert status == 0


@pytest.mark.parametrize("sizes", [range(1, 70), range(70, 2500, 61)], ids=["short", "longer"])
def test_lengths(queue: Any, sizes: range) -> None:
    words = shuffled(dict(zip(range(110, 126), fibonacci(16), strict=True)), seed=3)
    for size in sizes:
        assert_decodes(queue, encode_unit([words[:size]]), words[:size])


@pytest.mark.parametrize("size", [1, 16383, 16384, 16385, 32768, 32769])
@pytest.mark.parametrize("exponent", [0, 239])
def test_one_exponent(queue: Any, exponent: int, size: int) -> None:
    """Codes of two bits: 16384 fill a block."""
    words = words_of(np.full(size, exponent))
    assert_decodes(queue, encode_unit([words]), words)


@pytest.mark.parametrize("size", [*range(4090, 4100), 8191, 8192, 8193])
def test_block_borders(queue: Any, size: int) -> None:
    words = words_of(np.resize(np.arange(200), size))
    assert_decodes(queue, encode_unit([words]), words)


def test_codes_of_one_bit(queue: Any) -> None:
    words = shuffled({120: 70_000, 100: 20, 101: 9, 239: 1})
    unit = encode_unit([words])
    assert unit.luts[-1, 120] == 1
    device = OnDevice(queue, unit)
    assert device.geometry.block_symbols > 32_000
    got, status = device.decode()
    np.testing.assert_array_equal(got, words)
    assert status == 0


@pytest.mark.parametrize("rare", [0.02, 0.5, 1.0])
def test_codes_up_to_32_bits(queue: Any, rare: float) -> None:
    """Long codes as the most frequent ones: windows with two codes, gaps of 31."""
    rng = np.random.default_rng(5)
    counts = dict(enumerate(fibonacci(32), 90))
    exponents = np.where(rng.random(9000) < rare, rng.integers(90, 98, 9000), rng.integers(90, 122, 9000))
    words = words_of(exponents)
    unit = with_code_of(counts, words)
    assert unit.luts[-1].max() == 32
    assert unit.num_blocks > 4
    np.testing.assert_array_equal(naive.decode_unit(unit), words)
    assert_decodes(queue, unit, words)


def test_last_code_in_a_block_of_its_own(queue: Any) -> None:
    unit = last_code_in_a_block_of_its_own()
    assert_decodes(queue, unit, decode_unit(unit))


@ANY_QUEUE
@given(
    counts=st.dictionaries(st.integers(0, 239), st.integers(1, 400), min_size=1, max_size=60), seed=st.integers(0, 99)
)
def test_random_histograms(queue: Any, counts: dict[int, int], seed: int) -> None:
    words = shuffled(counts, seed)
    assert_decodes(queue, encode_unit([words]), words)


@ANY_QUEUE
@given(st.lists(st.integers(0, 40), min_size=2, max_size=100), st.integers(0, 99))
def test_random_codes(queue: Any, logs: list[int], seed: int) -> None:
    """Codes of all lengths in any mixture."""
    counts = {exponent: 1 << log for exponent, log in enumerate(logs)}
    words = words_of(np.random.default_rng(seed).choice(len(logs), 1500), seed)
    assert_decodes(queue, with_code_of(counts, words), words)


@pytest.fixture(scope="module")
def words() -> Words:
    return gaussian(60_000, seed=2)


def test_ranges(queue: Any, words: Words) -> None:
    device = OnDevice(queue, encode_unit([words]))
    starts = device.geometry.positions.tolist()
    rng = np.random.default_rng(1)
    ranges = [(0, 1), (59_999, 60_000), (7, 7), (starts[1], starts[2]), (starts[1] - 1, starts[1] + 1), (3, 59_998)]
    ranges += [tuple(sorted(rng.integers(0, 60_001, 2).tolist())) for _ in range(10)]
    ranges += [(begin, begin + int(rng.integers(1, 40))) for begin in rng.integers(0, 59_900, 10).tolist()]
    for i, (begin, end) in enumerate(ranges):
        got, status = device.decode(begin, end, offset=i % 9)
        np.testing.assert_array_equal(got, words[begin:end])
        assert status == 0


def test_every_alignment(queue: Any, words: Words) -> None:
    device = OnDevice(queue, encode_unit([words[:3000]]))
    for begin in range(9):
        for offset in range(8):
            np.testing.assert_array_equal(device.decode(begin, 2990, offset=offset)[0], words[begin:2990])


@pytest.mark.parametrize(("first", "cols", "rows"), [(0, 256, 200), (5, 333, 180), (40_000, 1, 20_000), (0, 30_000, 2)])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_rows(queue: Any, words: Words, first: int, cols: int, rows: int, kind: type[np.signedinteger[Any]]) -> None:
    device = OnDevice(queue, encode_unit([words]))
    matrix = words[first : first + rows * cols].reshape(rows, cols)
    ids = np.array([0, rows - 1, 0, *np.random.default_rng(3).integers(0, rows, 4)], kind)
    got, status = device.rows(first, cols, rows, ids)
    np.testing.assert_array_equal(got, matrix[ids])
    assert status == 0


def test_ids_outside_give_zeros(queue: Any, words: Words) -> None:
    device = OnDevice(queue, encode_unit([words]))
    ids = np.array([3, -1, 100, 5, 1 << 40, -(1 << 40)])
    got, status = device.rows(8, 77, 100, ids)
    matrix = words[8 : 8 + 7700].reshape(100, 77)
    np.testing.assert_array_equal(got, [matrix[3], *np.zeros((2, 77)), matrix[5], *np.zeros((2, 77))])
    assert status == 2


def test_rows_in_every_order_of_lanes(words: Words) -> None:
    unit = encode_unit([words])
    ids = np.array([190, 0, 7, 200])
    got, status = run_everywhere(lambda queue: OnDevice(queue, unit).rows(5, 299, 200, ids))
    np.testing.assert_array_equal(got[:3], words[5 : 5 + 200 * 299].reshape(200, 299)[ids[:3]])
    assert status == 2


def test_the_largest_unit() -> None:
    """2^32 - 1 weights with one exponent: a stream of zeros. Its memory is never touched but for the part decoded."""
    small = encode_unit([words_of(np.full(5, 77))])
    elements, blocks = (1 << 32) - 1, 1 << 18
    positions = np.minimum(16384 * np.arange(blocks + 1), elements).astype(np.uint32)
    geometry = Df11Geometry(elements, blocks, 4096 * blocks, 2, 2, 16384, positions)
    tables = np.concatenate([lookups(small.luts).view(np.uint8).reshape(-1), small.luts.reshape(-1)])
    signs = np.zeros(padded(elements), np.uint8)
    index = np.zeros(geometry.index_bytes, np.uint8)
    index[-padded(positions.nbytes) :].view(np.uint32)[: positions.size] = positions
    stream = np.zeros(geometry.stream_bytes, np.uint8)
    parts = [(part.ctypes.data, part.nbytes) for part in (tables, stream, signs, index)]
    for begin, end in [(elements - 20_000, elements), ((1 << 31) - 3, (1 << 31) + 9)]:
        signs[begin:end] = np.random.default_rng(begin).integers(0, 256, end - begin)
        expected = signs[begin:end].astype(np.uint16)
        expected = (expected & 0x80) << 8 | 77 << 7 | (expected & 0x7F)
        out, status = np.zeros(end - begin, np.uint16), np.zeros(1, np.uint32)
        df11.decode(EmulatedQueue(), parts, geometry, begin, end, out.ctypes.data, status.ctypes.data)
        np.testing.assert_array_equal(out, expected)
        assert status[0] == 0
    ids, row = np.array([(elements - 5) // 1000 - 1]), np.zeros(1000, np.uint16)
    df11.rows(
        EmulatedQueue(), parts, geometry, 5, 1000, elements // 1000, ids.ctypes.data, 8, 1, row.ctypes.data
    )  # fmt: skip
    begin = 5 + 1000 * int(ids[0])
    np.testing.assert_array_equal(row & 0x7F, signs[begin : begin + 1000] & 0x7F)
    assert set(row >> 7 & 0xFF) == {77}


def test_arguments_are_checked(queue: Any, words: Words) -> None:
    device = OnDevice(queue, encode_unit([words[:100]]))
    for begin, end in [(-1, 5), (5, 4), (0, 101)]:
        with pytest.raises(UsageError, match="100 weights"):
            df11.decode(queue, device.parts, device.geometry, begin, end, 256)
    with pytest.raises(UsageError, match=r"\[11, 10\] from 0"):
        df11.rows(queue, device.parts, device.geometry, 0, 10, 11, 256, 8, 1, 256)
    with pytest.raises(UsageError, match="4 or 8 bytes"):
        df11.rows(queue, device.parts, device.geometry, 0, 10, 10, 256, 2, 1, 256)
    shorter = [*device.parts[:3], (device.parts[3][0], device.parts[3][1] - 16)]
    with pytest.raises(CorruptTensorError, match="different units"):
        df11.decode(queue, shorter, device.geometry, 0, 1, 256)
