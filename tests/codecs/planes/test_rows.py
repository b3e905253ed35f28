"""Rows read from parts that lie elsewhere, against decoding them with all parts at hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitforbit import cpu
from bitforbit.codecs.base import EncodedTensor
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.codecs.planes.layout import PLANE_WIDTHS
from bitforbit.codecs.planes.rows import PlanesRowReader
from bitforbit.errors import CorruptTensorError, UsageError
from helpers.bits import assert_bitwise_equal
from helpers.device_planes import hostile_bytes

CODEC = PlanesCodec()
STYLES = ["random", "trained", "constant", "far", "zeros"]
CASES = [(kind, False) for kind in PLANE_WIDTHS] + [("BF16", True)]


class Parts:
    """Parts of a tensor that count what is fetched, and refuse what lies outside."""

    def __init__(self, tensor: EncodedTensor) -> None:
        self.tensor = tensor
        self.sizes = {name: part.nbytes for name, part in tensor.parts.items()}
        self.fetched = 0

    def fetch(self, name: str, offset: int, out: np.ndarray) -> None:
        assert 0 <= offset <= offset + out.nbytes <= self.sizes[name], f"{name}: {offset} + {out.nbytes}"
        out[:] = self.tensor.parts[name][offset : offset + out.nbytes]
        self.fetched += out.nbytes

    def reader(self, end_row: int) -> PlanesRowReader:
        t = self.tensor
        cols = int(t.config["cols"])
        return CODEC.row_reader(t.dtype, t.shape, t.config, self.sizes, self.fetch, end_row * cols)


def encoded(data: np.ndarray, kind: str, wide: bool, rows: int, cols: int, rows_per_table: int = 0) -> EncodedTensor:
    dtype = "F32" if wide else kind
    return CODEC.encode_always(data, dtype, (rows, cols), kind, 1, rows_per_table=rows_per_table)


@settings(deadline=None, max_examples=150)
@given(
    isa=st.sampled_from([name for name, supported in cpu.implementations().items() if supported]),
    case=st.sampled_from(CASES),
    rows=st.integers(1, 100),
    cols=st.integers(1, 200),
    style=st.sampled_from(STYLES),
    rows_per_table=st.sampled_from([0, 16, 48]),
    data=st.data(),
)
def test_any_rows(
    isa: str, case: tuple[str, bool], rows: int, cols: int, style: str, rows_per_table: int, data: st.DataObject
) -> None:
    original = hostile_bytes(*case, rows * cols, rows * cols, style)
    parts = Parts(encoded(original, *case, rows, cols, rows_per_table))
    end = data.draw(st.integers(0, rows))
    reader = parts.reader(end)
    row_bytes = original.nbytes // rows
    for _ in range(2):
        last = data.draw(st.integers(0, end))
        first = data.draw(st.integers(0, last))
        out = np.full((last - first) * row_bytes, 0x55, np.uint8)
        with cpu.force(isa):
            reader.read(first, last, out, 2)
        assert_bitwise_equal(out, original[first * row_bytes : last * row_bytes])


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_every_pattern_of_two_bytes(kind: str) -> None:
    words = np.random.default_rng(1).permutation(np.arange(1 << 16, dtype="<u2"))
    original = words.view(np.uint8)
    parts = Parts(encoded(original, kind, False, 256, 256))
    for first, last in ((0, 256), (0, 16), (17, 31), (240, 256), (100, 201)):
        out = np.empty((last - first) * 512, np.uint8)
        parts.reader(last).read(first, last, out, 1)
        assert_bitwise_equal(out, original[first * 512 : last * 512])


@pytest.mark.parametrize("style", STYLES)
def test_only_what_is_needed_is_fetched(style: str) -> None:
    parts = Parts(encoded(hostile_bytes("BF16", False, 512 * 768, 0, style), "BF16", False, 512, 768))
    out = np.empty(64 * 768 * 2, np.uint8)
    for eighth in range(8):
        parts.fetched = 0
        parts.reader(64 * (eighth + 1)).read(64 * eighth, 64 * (eighth + 1), out, 1)
        assert parts.fetched < parts.tensor.nbytes / 8 * 1.01 + 1024
    parts.fetched = 0
    reader = parts.reader(512)
    for begin in range(0, 512, reader.step):
        reader.read(begin, begin + reader.step, out[: 16 * 768 * 2], 1)
    assert parts.fetched <= parts.tensor.nbytes


def test_rows_outside() -> None:
    parts = Parts(encoded(hostile_bytes("BF16", False, 40 * 100, 0, "trained"), "BF16", False, 40, 100))
    for end in (-1, 41):
        with pytest.raises(UsageError, match="expected"):
            parts.reader(end)
    reader = parts.reader(16)
    for begin, end in ((0, 17), (-1, 2), (3, 2)):
        with pytest.raises(UsageError, match="expected"):
            reader.read(begin, end, np.empty(max(0, end - begin) * 200, np.uint8), 1)


@settings(deadline=None, max_examples=150)
@given(
    part=st.sampled_from(CODEC.part_names),
    seed=st.integers(0, 1 << 30),
    flips=st.integers(1, 40),
    first=st.integers(0, 36),
)
def test_damage_is_never_followed(part: str, seed: int, flips: int, first: int) -> None:
    """Whatever the parts hold, no byte outside them is asked for, and what decodes is what a full decode gives."""
    rng = np.random.default_rng(seed)
    tensor = encoded(hostile_bytes("BF16", False, 37 * 150, seed, "zeros"), "BF16", False, 37, 150, 16)
    damaged = {name: value.copy() for name, value in tensor.parts.items()}
    damaged[part][rng.integers(0, damaged[part].size, flips)] = rng.integers(0, 256, flips)
    tensor = EncodedTensor("planes", 1, "BF16", tensor.shape, tensor.config, damaged)
    out, whole = np.empty((37 - first) * 300, np.uint8), np.empty(37 * 300, np.uint8)
    try:
        Parts(tensor).reader(37).read(first, 37, out, 1)
    except CorruptTensorError:
        return
    try:
        CODEC.decode(tensor, whole, None, 1)
    except CorruptTensorError:
        return  # what is wrong lies before the rows read
    assert_bitwise_equal(out, whole[first * 300 :])


@pytest.mark.parametrize(("count", "match"), [(0xFFFFFFFF, "counts up to 1600"), (1600, "tails of 1 blocks within")])
def test_counts_that_cannot_be(count: int, match: str) -> None:
    tensor = encoded(hostile_bytes("BF16", False, 40 * 100, 0, "trained"), "BF16", False, 40, 100)
    code = tensor.parts["code"].copy()
    code[16:28] = np.full(3, count, "<u4").view(np.uint8)
    damaged = EncodedTensor("planes", 1, "BF16", tensor.shape, tensor.config, {**tensor.parts, "code": code})
    with pytest.raises(CorruptTensorError, match=match):
        Parts(damaged).reader(16)
