"""Units that contradict themselves are refused; no bytes whatever crash the decoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from bitforbit.codecs.df11 import TENSOR_NAMES, Df11Unit, decode_unit, encode_unit
from bitforbit.codecs.df11.codebook import build, validate_luts
from bitforbit.errors import Df11FormatError, Df11LutError, Df11PositionsError

U8 = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def unit() -> Df11Unit:
    """Four blocks, more than two tables."""
    rng = np.random.default_rng(0)
    scales = np.where(rng.random(40000) < 0.02, 10.0 ** rng.uniform(-20, 10, 40000), 1)
    words = (rng.standard_normal(40000) * scales).astype(np.float32).view(np.uint32) >> 16
    unit = encode_unit([words.astype(np.uint16)[:20000], words.astype(np.uint16)[20000:]])
    assert unit.num_blocks == 4
    assert unit.luts.shape[0] > 3
    return unit


def positions(values: list[int]) -> U8:
    return np.array(values, "<u4").view(np.uint8)


def starts(unit: Df11Unit) -> list[int]:
    return [int(p) for p in unit.output_positions.view("<u4")]


def lut(*rows: dict[int, int], lengths: dict[int, int]) -> U8:
    """Tables from their runs {first entry: value}, and the length row."""
    luts = np.zeros((len(rows) + 1, 256), np.uint8)
    for row, runs in zip(luts, rows, strict=False):
        for begin, value in runs.items():
            row[begin:] = value
    for symbol, length in lengths.items():
        luts[-1, symbol] = length
    return luts


def test_good_tables() -> None:
    validate_luts(lut({0: 7, 128: 8}, lengths={7: 1, 8: 1}))
    validate_luts(lut({0: 7, 255: 255}, {0: 8, 128: 9}, lengths={7: 1, 8: 9, 9: 9}))
    # Start of a table left over from the end of the table before: here a pointer to the table itself.
    validate_luts(lut({0: 7, 255: 255}, {0: 255, 128: 9}, lengths={7: 1, 9: 9}))


BAD_TABLES = {
    "one row": np.zeros((1, 256), np.uint8),
    "19 rows": np.zeros((19, 256), np.uint8),
    "255 columns": np.zeros((2, 255), np.uint8),
    "length 33": lut({0: 7, 128: 8}, lengths={7: 1, 8: 33}),
    "length of a pointer": lut({0: 7, 128: 8}, lengths={7: 1, 8: 1, 240: 3}),
    "dangling pointer": lut({0: 7, 255: 254}, {0: 8, 128: 9}, lengths={7: 1, 8: 9, 9: 9}),
    "length 0 reachable": lut({0: 7, 128: 8}, lengths={7: 1}),
    "length 0 at the root's start": lut({0: 6, 64: 7, 128: 8}, lengths={7: 2, 8: 1}),
    "loop": lut({0: 7, 255: 255}, {0: 8, 128: 255}, lengths={7: 1, 8: 9}),
    "loop of a whole table": lut({0: 7, 255: 255}, {0: 255}, lengths={7: 1}),
    "pointer back": lut(
        {0: 7, 254: 255, 255: 254}, {0: 8, 128: 9}, {0: 5, 128: 255}, lengths={7: 1, 8: 9, 9: 9, 5: 9}
    ),
    "table nobody reaches": lut({0: 7, 128: 8}, {0: 9}, lengths={7: 1, 8: 1, 9: 9}),
    "symbol in no table": lut({0: 7, 128: 8}, lengths={7: 1, 8: 1, 9: 4}),
    "too short for its depth": lut({0: 7, 255: 255}, {0: 8, 128: 9}, lengths={7: 1, 8: 3, 9: 9}),
    "too long for its depth": lut({0: 7, 128: 8}, lengths={7: 1, 8: 9}),
    "too few entries": lut({0: 7, 128: 8, 160: 9}, lengths={7: 1, 8: 1, 9: 2}),
    "not aligned": lut({0: 7, 100: 8}, lengths={7: 2, 8: 1}),
    "five levels": lut(
        {0: 7, 255: 255}, {0: 8, 255: 254}, {0: 9, 255: 253}, {0: 10, 255: 252}, {0: 11},
        lengths={7: 1, 8: 9, 9: 17, 10: 25, 11: 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(name: str) -> None:
    with pytest.raises(Df11LutError):
        validate_luts(BAD_TABLES[name])


def test_tables_of_the_encoder_are_valid() -> None:
    rng = np.random.default_rng(5)
    for _ in range(400):
        counts = np.zeros(256, np.int64)
        used = rng.choice(240, rng.integers(1, 240), replace=False)
        counts[used] = np.exp(rng.uniform(0, rng.uniform(0.1, 20), used.size)).astype(np.int64)
        validate_luts(build(counts).luts)


def test_positions(unit: Df11Unit) -> None:
    good = starts(unit)
    n = good[-1]
    for values in (
        [], good[:-1], [*good, n], [1, *good[1:]], [*good[:-1], n - 1], [good[0], good[2], good[1], *good[3:]],
        [0, 0, 0, 0, n + (1 << 20)], [0, 0, 0, 0, n],
    ):  # fmt: skip
        with pytest.raises(Df11PositionsError):
            decode_unit(replace(unit, output_positions=positions(values)))
    with pytest.raises(Df11PositionsError):
        decode_unit(replace(unit, output_positions=unit.output_positions[:-1]))


def test_positions_against_the_stream(unit: Df11Unit) -> None:
    good = starts(unit)
    for block in (1, 2, 3):
        for step in (-1, 1):
            values = list(good)
            values[block] += step
            with pytest.raises(Df11FormatError, match="contradict"):
                decode_unit(replace(unit, output_positions=positions(values)))


@pytest.mark.parametrize("splits", [[0], [5, 5], [9, 3], [-1], [40000], [40001], [1 << 62]])
def test_splits(unit: Df11Unit, splits: list[int]) -> None:
    with pytest.raises(Df11PositionsError):
        decode_unit(replace(unit, split_positions=np.array(splits, np.int64)))


def test_sizes(unit: Df11Unit) -> None:
    empty = np.empty(0, np.uint8)
    for change in (
        {"gaps": unit.gaps[:-1]},
        {"gaps": np.append(unit.gaps, unit.gaps)},
        {"encoded_exponent": unit.encoded_exponent[:-1]},
        {"encoded_exponent": np.append(unit.encoded_exponent, np.uint8(0))},
        {"encoded_exponent": empty},
        {"sign_mantissa": unit.sign_mantissa[:-1]},
        {"sign_mantissa": np.append(unit.sign_mantissa, np.uint8(0))},
        {"sign_mantissa": empty},
        {"sign_mantissa": unit.sign_mantissa.view(np.int8)},
        {"split_positions": unit.split_positions.astype(np.int32)},
    ):
        with pytest.raises(Df11FormatError):
            decode_unit(replace(unit, **change))  # type: ignore[arg-type]


def test_no_weights_with_a_stream(unit: Df11Unit) -> None:
    hostile = replace(
        unit,
        sign_mantissa=np.empty(0, np.uint8),
        split_positions=np.empty(0, np.int64),
        output_positions=positions([0] * 5),
    )
    with pytest.raises(Df11FormatError):
        decode_unit(hostile)


def test_first_code_not_at_the_start(unit: Df11Unit) -> None:
    gaps = unit.gaps.copy()
    gaps[0] |= 0x08
    with pytest.raises(Df11FormatError):
        decode_unit(replace(unit, gaps=gaps))


def test_a_hole_in_the_tables_that_the_stream_hits() -> None:
    """A left-over entry is legal where no data leads; a stream that leads there is not."""
    luts = lut({0: 7, 255: 255}, {0: 255, 128: 9}, lengths={7: 1, 9: 9})
    gaps = np.zeros(320, np.uint8)
    good = Df11Unit(
        luts=luts, encoded_exponent=np.array([0xFF, 0x80], np.uint8), sign_mantissa=np.zeros(8, np.uint8),
        output_positions=positions([0, 8]), gaps=gaps, split_positions=np.empty(0, np.int64),
    )  # fmt: skip
    assert (decode_unit(good) >> 7).tolist() == [9] + [7] * 7
    with pytest.raises(Df11FormatError, match="starts no code"):
        decode_unit(replace(good, encoded_exponent=np.array([0xFF, 0x00], np.uint8)))


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_flipped_bytes_never_crash(unit: Df11Unit, name: str) -> None:
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(300):
        array = unit.tensors()[name].copy()
        view = array.reshape(-1).view(np.uint8)
        for at in rng.integers(0, view.size, rng.integers(1, 6)):
            view[at] ^= rng.integers(1, 256)
        try:
            decode_unit(replace(unit, **{name: array}), threads=int(rng.integers(1, 3)))  # type: ignore[arg-type]
        except Df11FormatError:
            refused += 1
    assert refused > 0 or name in ("sign_mantissa", "gaps")


def test_random_units_never_crash(unit: Df11Unit) -> None:
    """Random streams and positions under valid tables, and valid streams under random tables."""
    rng = np.random.default_rng(12)
    for _ in range(300):
        stream = rng.integers(0, 256, rng.integers(1, 9000), dtype=np.uint8)
        blocks = -(-stream.size // 4096)
        inner = np.sort(rng.integers(0, 20000, blocks + 1))
        inner[0] = 0
        hostile = Df11Unit(
            luts=unit.luts if rng.random() < 0.7 else rng.integers(0, 256, unit.luts.shape, dtype=np.uint8),
            encoded_exponent=stream,
            sign_mantissa=np.zeros(int(inner[-1]), np.uint8),
            output_positions=positions(inner.tolist()),
            gaps=np.concatenate([np.zeros(1, np.uint8), rng.integers(0, 256, 320 * blocks - 1, dtype=np.uint8)]),
            split_positions=np.empty(0, np.int64),
        )
        with pytest.raises(Df11FormatError):
            decode_unit(hostile)


def test_unvalidated_tables_never_crash_the_native_decoder(unit: Df11Unit) -> None:
    from bitforbit.codecs.df11.decode import check_unit
    from bitforbit.cpu import df11 as native

    rng = np.random.default_rng(13)
    starts = check_unit(unit)
    words = np.empty(unit.num_weights, np.uint16)
    for _ in range(300):
        luts = unit.luts.copy()
        for at in rng.integers(0, luts.size, rng.integers(1, 200)):
            luts.reshape(-1)[at] = rng.integers(0, 256)
        try:
            native.decode(luts, unit.encoded_exponent, unit.sign_mantissa, starts, unit.gaps, words, 2)
        except Df11FormatError:
            continue
