"""What the host makes of a unit's tensors, what it refuses, how it launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from df11_cases import fibonacci, gaussian, last_code_in_a_block_of_its_own, shuffled, words_of

from bitforbit.codecs.df11 import Df11Unit, encode_unit, naive
from bitforbit.cuda import df11
from bitforbit.cuda.df11.prepare import lookups
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.errors import CorruptTensorError, Df11FormatError, Df11LutError, Df11PositionsError

H100 = DeviceProperties("H100", (9, 0), 132, 50 << 20, 227 << 10)
A100 = DeviceProperties("A100", (8, 0), 108, 40 << 20, 163 << 10)
RTX4090 = DeviceProperties("RTX 4090", (8, 9), 128, 72 << 20, 99 << 10)


def prepare(unit: Df11Unit) -> tuple[df11.Df11Geometry, dict[str, np.ndarray]]:
    return df11.prepare(unit.luts, unit.encoded_exponent, unit.sign_mantissa, unit.output_positions, unit.gaps)


def walk(luts: np.ndarray, bits: str) -> tuple[int, int] | None:
    """Exponent and length of the code that 32 bits begin with."""
    table, level = 0, 0
    while (value := int(luts[table][int(bits[8 * level : 8 * level + 8], 2)])) >= 240:
        table, level = 256 - value, level + 1
        if level == 4 or table >= len(luts) - 1:
            return None
    length = int(luts[-1][value])
    return (value, length) if 8 * level < length <= 8 * level + 8 else None


CODES = [
    {7: 3},
    {7: 1, 9: 100},
    dict(enumerate(fibonacci(20))),
    dict.fromkeys(range(200), 5),
    dict(enumerate(fibonacci(32), 9)),
]


@pytest.mark.parametrize("counts", CODES)
def test_lookups(counts: dict[int, int]) -> None:
    """Each holds the codes that its bits show whatever follows, up to four of them."""
    luts = naive.lookup_tables(naive.code_table(Counter(counts)))
    rng = np.random.default_rng(0)
    ends = [f"{rest:021b}" * 2 for rest in (0, (1 << 21) - 1, *rng.integers(0, 1 << 21, 4).tolist())]
    for index, (step, symbols) in enumerate(lookups(luts).tolist()):
        used = step & 0x7F
        at, values, steps = 0, [], 0
        for count in range(5):
            codes = {walk(luts, (f"{index:011b}" + end)[at : at + 32]) for end in ends}
            code = codes.pop()
            if count == 4 or codes or code is None or at + code[1] > 11:
                break
            values.append(code[0])
            at += code[1]
            steps |= 1 << 19 + at
        if values:
            assert (used, step, symbols) == (
                at, at | len(values) << 11 | steps, sum(value << 8 * i for i, value in enumerate(values)),
            )  # fmt: skip
        else:
            assert (step, symbols) == (0x80, 0)


def test_parts() -> None:
    words = gaussian(30_001)
    unit = encode_unit([words])
    geometry, parts = prepare(unit)
    assert tuple(parts) == df11.PARTS
    assert tuple(part.size for part in parts.values()) == geometry.part_bytes
    assert all(part.size % 16 == 0 for part in parts.values())
    assert parts["stream"][: unit.encoded_exponent.size].tobytes() == unit.encoded_exponent.tobytes()
    assert parts["sign_mantissa"][:30_001].tobytes() == unit.sign_mantissa.tobytes()
    stored = sum(array.nbytes for array in unit.tensors().values())
    assert sum(part.size for part in parts.values()) < stored + (17 << 10)


@pytest.mark.parametrize("unit", [
    encode_unit([gaussian(30_001)]), encode_unit([words_of([5])]), last_code_in_a_block_of_its_own(),
], ids=["gaussian", "one weight", "no position"])  # fmt: skip
def test_geometry_comes_back_from_the_index(unit: Df11Unit) -> None:
    geometry, parts = prepare(unit)
    again = df11.geometry_of(parts["index"], geometry.elements, geometry.stream_bytes)
    np.testing.assert_array_equal(again.positions, geometry.positions)
    for name in ("elements", "blocks", "stream_bytes", "table_rows", "shortest", "block_symbols", "part_bytes"):
        assert getattr(again, name) == getattr(geometry, name)
    assert len({geometry, again}) == 2


def test_blocks_of_a_range() -> None:
    geometry, _ = prepare(encode_unit([gaussian(60_000)]))
    starts = geometry.positions.tolist()
    for begin, end in [(0, 1), (starts[1] - 1, starts[1]), (starts[1], starts[2]), (starts[2] - 1, starts[3] + 1)]:
        first, last = geometry.blocks_of(begin, end)
        assert starts[first] <= begin < starts[first + 1]
        assert starts[last - 1] < end <= starts[last]
    assert geometry.blocks_of(0, 60_000) == (0, geometry.blocks)


def test_wrong_index() -> None:
    geometry, parts = prepare(encode_unit([gaussian(30_001)]))
    index, size, nbytes = parts["index"], geometry.elements, geometry.stream_bytes

    def changed(word: int, value: int) -> np.ndarray:
        other = index.copy()
        other.view("<u4")[word] = value
        return other

    first_position = 16 + 40 * geometry.blocks
    for bad, message in [
        (index[:-16], "blocks"), (index[:32], "uint8"), (index.view(np.int8), "int8"), (changed(0, 5), "begins with"),
        (changed(7, 5), "begins with"), (changed(2, 9), "9 blocks"), (changed(4, 1), "table rows"),
        (changed(4, 19), "table rows"), (changed(5, 0), "from 1 to 32 bits"), (changed(5, 33), "from 1 to 32 bits"),
        (changed(6, 9), "at most 9"), (changed(first_position, 1), "from 0"),
        (changed(first_position + 1, 1 << 31), "positions"),
    ]:  # fmt: skip
        with pytest.raises(CorruptTensorError, match=message):
            df11.geometry_of(bad, size, nbytes)
    for other in [(size + 1, nbytes), (size, nbytes + 16)]:
        with pytest.raises(CorruptTensorError, match="different units"):
            df11.geometry_of(index, *other)


def test_refusals() -> None:
    unit = encode_unit([gaussian(30_001)])
    luts = unit.luts.copy()
    luts[-1, luts[0, 0]] = 33
    with pytest.raises(Df11LutError):
        prepare(replace(unit, luts=luts))
    with pytest.raises(Df11PositionsError):
        prepare(replace(unit, output_positions=unit.output_positions[::-1].copy()))
    with pytest.raises(Df11FormatError, match="bytes of gaps"):
        prepare(replace(unit, gaps=unit.gaps[:-1]))
    gaps = unit.gaps.copy()
    gaps[0] |= 0x08
    with pytest.raises(Df11FormatError, match="got bit 1"):
        prepare(replace(unit, gaps=gaps))
    empty = np.empty(0, np.uint8)
    with pytest.raises(Df11FormatError, match="at least one weight"):
        prepare(Df11Unit(unit.luts, empty, empty, np.zeros(4, np.uint8), empty, np.empty(0, np.int64)))


def test_launches() -> None:
    words = gaussian(60_000)
    geometry, _ = prepare(encode_unit([words]))
    for properties in (H100, A100, RTX4090):
        config = df11.decode_config(geometry, geometry.blocks, properties)
        assert config.grid[0] == geometry.blocks
        many = df11.decode_config(geometry, 100_000, properties).grid[0]
        assert many % properties.multiprocessors == 0 or many * (100_000 // many + 1) >= 100_000
        assert properties.multiprocessors <= many <= 4 * properties.multiprocessors
        assert df11.rows_config(geometry, 3, properties).grid[0] == 3
        assert df11.rows_config(geometry, 1 << 40, properties).grid[0] <= 4 * properties.multiprocessors


def test_shared_memory_always_suffices() -> None:
    """The largest tables, the shortest codes and the fullest block, on a GPU with little shared memory."""
    one_bit, _ = prepare(encode_unit([shuffled({120: 70_000, 100: 20, 101: 9})]))
    worst = replace(one_bit, table_rows=18, block_symbols=32768)
    assert worst.shared_bytes + 1024 <= RTX4090.shared_bytes_per_block
    usual, _ = prepare(encode_unit([gaussian(60_000)]))
    assert 4 * (usual.shared_bytes + 2048) <= H100.shared_bytes_per_block
