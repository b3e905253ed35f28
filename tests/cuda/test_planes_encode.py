"""Encoding on the GPU (or emulated) against the CPU encoder and the reference: the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from bitforbit import dtypes
from bitforbit.codecs.planes import PlanesCodec, naive
from bitforbit.codecs.planes.layout import Layout
from bitforbit.cpu import planes as native
from bitforbit.cuda.kernel import Argument, Kernel, LaunchConfig
from bitforbit.cuda.planes import encode as gpu
from bitforbit.cuda.queue import Buffer, Queue
from bitforbit.errors import UsageError
from cuda_shim import emulation

KINDS = list(gpu.KINDS)
IDS = [kind + "_in_F32" * wide for kind, wide in KINDS]
SHAPES = [(1, 1), (1, 63), (1, 64), (1, 65), (2, 3), (16, 64), (17, 130), (33, 65), (3, 1500), (100, 24)]
STYLES = ["random", "trained", "constant", "far", "zeros", "uniform"]

Bytes = np.ndarray
Encoded = tuple[int, dict[str, Buffer]]


def stored(words: np.ndarray, kind: str, wide: bool) -> Bytes:
    """Bytes of bit patterns in memory."""
    if wide:
        return np.frombuffer((words.astype("<u4") << 16).tobytes(), np.uint8)
    return np.frombuffer(words.astype(f"<u{dtypes.FLOAT_LAYOUTS[kind].itemsize}").tobytes(), np.uint8)


def floats(kind: str, wide: bool, n: int, style: str, seed: int = 0) -> Bytes:
    """Bytes of n floats whose exponents are random, as in trained weights, constant, ..."""
    rng = np.random.default_rng(seed)
    layout = dtypes.FLOAT_LAYOUTS[kind]
    top = 1 << layout.exponent_bits
    exponents = {
        "random": lambda: rng.integers(0, top, n),
        "trained": lambda: np.clip(top // 2 - rng.geometric(0.4, n), 0, top - 1),
        "constant": lambda: np.full(n, top - 1),
        "far": lambda: rng.choice([0, 1, top // 2, top - 2, top - 1], n),
        "zeros": lambda: np.where(rng.random(n) < 0.7, 0, rng.integers(0, top, n)),
        "uniform": lambda: np.arange(n) % top,
    }[style]()
    rest = rng.integers(0, 1 << (1 + layout.mantissa_bits), n).astype(np.uint32)
    return stored(dtypes.join(exponents.astype(np.uint32), rest, layout), kind, wide)


def assert_same(queue: Queue, found: Encoded | None, expected: tuple[int, dict[str, Bytes]], what: object = "") -> None:
    """The same rows per table and, byte for byte, the same parts."""
    assert found is not None
    assert found[0] == expected[0]
    assert list(found[1]) == list(expected[1])
    for name, part in expected[1].items():
        assert found[1][name].nbytes == part.nbytes
        got = np.frombuffer(queue.download(found[1][name]), np.uint8)
        np.testing.assert_array_equal(got, part, f"{name} of {what}")


def check(queue: Queue, data: Bytes, kind: str, wide: bool, rows: int, cols: int, rows_per_table: int = 0) -> None:
    """Encodes on the GPU and on the CPU."""
    matrix = queue.upload(data.tobytes())
    found = gpu.encode(queue, matrix.address, kind, wide, rows, cols, rows_per_table, always=True)
    expected = native.encode(data, kind, wide, rows, cols, rows_per_table, 1)
    assert_same(queue, found, expected, (kind, wide, rows, cols, rows_per_table))


@pytest.mark.parametrize(("kind", "wide"), KINDS, ids=IDS)
@pytest.mark.parametrize("style", STYLES)
def test_parts_are_those_of_the_cpu(queue: Queue, kind: str, wide: bool, style: str) -> None:
    for seed, (rows, cols) in enumerate(SHAPES):
        check(queue, floats(kind, wide, rows * cols, style, seed), kind, wide, rows, cols)


@pytest.mark.parametrize(("kind", "wide"), KINDS, ids=IDS)
def test_parts_are_those_of_the_reference(queue: Queue, kind: str, wide: bool) -> None:
    rows, cols = 35, 130
    data = floats(kind, wide, rows * cols, "trained")
    matrix = queue.upload(data.tobytes())
    found = gpu.encode(queue, matrix.address, kind, wide, rows, cols, 16, always=True)
    assert found is not None
    layout = Layout(kind, rows, cols, 16)
    words = np.frombuffer(data.tobytes(), f"<u{4 if wide else dtypes.FLOAT_LAYOUTS[kind].itemsize}").astype(np.uint32)
    words = words >> 16 if wide else words
    tables = np.frombuffer(queue.download(found[1]["code"]), np.uint8)[: 16 * layout.tables].reshape(-1, 16)
    expected = naive.encode(words, layout, tables[:, :9].tolist())
    assert_same(queue, found, (16, expected))
    parts = {name: np.frombuffer(queue.download(part), np.uint8) for name, part in found[1].items()}
    np.testing.assert_array_equal(naive.decode(parts, layout), words)


@pytest.mark.parametrize(("kind", "wide"), KINDS, ids=IDS)
def test_all_bit_patterns(queue: Queue, kind: str, wide: bool) -> None:
    if dtypes.FLOAT_LAYOUTS[kind].itemsize == 4:
        # Every sign and exponent with mantissas that end in all kinds of bytes: NaN payloads, infinities, subnormals.
        mantissas = np.array([0, 1, 0x7F, 0x80, 0xFF00, 0x400000, 0x7FFFFF, 0x2AAAAA], np.uint32)
        words = (np.arange(512, dtype=np.uint32)[:, None] << 23 | mantissas).ravel()
    else:
        words = np.arange(1 << 8 * dtypes.FLOAT_LAYOUTS[kind].itemsize, dtype=np.uint32)
    rows = 16 if len(words) < 65536 else 128
    check(queue, stored(words, kind, wide), kind, wide, rows, len(words) // rows)
    shuffled = np.random.default_rng(1).permutation(words)
    check(queue, stored(shuffled, kind, wide), kind, wide, len(words) // 64, 64)


@pytest.mark.parametrize("style", STYLES)
def test_long_blocks(queue: Queue, style: str) -> None:
    """Many chunks of groups, so that what waits for a whole group goes round the stage, whatever the levels' shares."""
    for rows, cols in ((16, 2560), (20, 1027)):
        check(queue, floats("BF16", False, rows * cols, style), "BF16", False, rows, cols)


@pytest.mark.parametrize("rows_per_table", [0, 16, 48, 64, 256, 1 << 40])
def test_rows_per_table(queue: Queue, rows_per_table: int) -> None:
    """Histograms of all elements and of samples, of few and of many rows; some have fewer chunks than a stride."""
    for rows, cols in ((140, 64), (70, 1030), (650, 67), (1100, 1)):
        # Each 64 rows have exponents of their own, which more than one table pays for.
        data = floats("BF16", False, rows * cols, "trained")
        words = np.frombuffer(data.tobytes(), "<u2").reshape(rows, cols) - (np.arange(rows) // 64 % 9 * 640)[:, None]
        check(queue, stored(words.ravel(), "BF16", False), "BF16", False, rows, cols, rows_per_table)


@pytest.mark.parametrize(("kind", "wide"), KINDS, ids=IDS)
def test_ranges_of_a_larger_matrix(queue: Queue, kind: str, wide: bool) -> None:
    """Rows and columns of a matrix, on every alignment, are encoded as if they were a matrix of their own."""
    for rows, cols, (top, bottom), (left, right) in (
        (40, 256, (3, 36), (64, 256)),
        (40, 256, (16, 32), (1, 255)),
        (40, 131, (1, 40), (0, 131)),
        (40, 131, (7, 20), (66, 131)),
    ):
        data = floats(kind, wide, rows * cols, "trained")
        itemsize = data.nbytes // (rows * cols)
        matrix = queue.upload(data.tobytes())
        part = np.ascontiguousarray(data.reshape(rows, cols, itemsize)[top:bottom, left:right]).reshape(-1)
        found = gpu.encode(
            queue, matrix.address + (top * cols + left) * itemsize, kind, wide, bottom - top, right - left,
            row_stride=cols, always=True,
        )  # fmt: skip
        assert_same(queue, found, native.encode(part, kind, wide, bottom - top, right - left, 0, 1))


def test_rows_far_apart() -> None:
    """More than 2^32 elements from row to row; of the memory between them nothing is touched."""
    stride, cols = (1 << 32) + 70, 100
    memory = np.zeros(2 * (stride + cols), np.uint8)
    matrix = memory.view("<u2")
    data = np.frombuffer(floats("BF16", False, 2 * cols, "trained").tobytes(), "<u2").reshape(2, cols)
    matrix[:cols], matrix[stride:] = data
    emulated = emulation.EmulatedQueue()
    found = gpu.encode(emulated, memory.ctypes.data, "BF16", False, 2, cols, row_stride=stride, always=True)
    assert_same(emulated, found, native.encode(data.reshape(-1).view(np.uint8), "BF16", False, 2, cols, 0, 1))
    assert gpu.is_widened_bf16(emulated, memory.ctypes.data + 4 * cols, 1, cols, stride)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("style", ["trained", "random"])
def test_what_does_not_pay_is_left(queue: Queue, dtype: str, style: str) -> None:
    decided = set()
    for rows, cols in ((1, 64), (2, 128), (4, 100), (16, 100), (16, 256), (64, 96)):
        data = floats(dtype, False, rows * cols, style)
        matrix = queue.upload(data.tobytes())
        found = gpu.encode(queue, matrix.address, dtype, False, rows, cols)
        expected = PlanesCodec().encode(data, dtype, (rows, cols), 1)
        decided.add(expected is None)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert_same(queue, found, (int(expected.config["rows_per_table"]), dict(expected.parts)))
    assert True in decided
    assert style == "random" or False in decided


def test_widened_bf16_is_found(queue: Queue) -> None:
    rows, cols = 37, 300
    data = np.frombuffer(floats("BF16", True, rows * cols, "random").tobytes(), "<u4").copy()
    matrix = queue.upload(data.tobytes())
    assert gpu.is_widened_bf16(queue, matrix.address, rows, cols)
    for element in (0, 299, rows * cols - 1):
        for bit in (0, 15):
            other = data.copy()
            other[element] |= 1 << bit
            matrix = queue.upload(other.tobytes())
            assert not gpu.is_widened_bf16(queue, matrix.address, rows, cols)
    # Columns 10 to 19 of a matrix whose other columns are no BF16; one row only.
    other = data.reshape(rows, cols) | 1
    other[:, 10:20] &= 0xFFFF0000
    matrix = queue.upload(other.tobytes())
    assert gpu.is_widened_bf16(queue, matrix.address + 40, rows, 10, cols)
    assert not gpu.is_widened_bf16(queue, matrix.address + 40, 1, 11, cols)


# Each binary of these modes takes long to build; the others have the same planes and widths of elements.
@pytest.mark.parametrize(("kind", "wide"), KINDS, ids=IDS)
@pytest.mark.parametrize("mode", ["races", "memory"])
def test_no_races_and_no_access_outside_of_buffers(mode: str, kind: str, wide: bool) -> None:
    checked = emulation.queue(mode)
    for style, rows, cols in (("random", 17, 130), ("trained", 18, 300)):
        check(checked, floats(kind, wide, rows * cols, style), kind, wide, rows, cols)
    if wide:
        matrix = checked.upload(floats("BF16", True, 17 * 70, "random").tobytes())
        assert gpu.is_widened_bf16(checked, matrix.address, 17, 70)


def test_data_that_changes_meanwhile_overruns_nothing() -> None:
    """What was counted bounds what is written."""

    class Meddler(emulation.CheckedQueue):
        def launch(self, kernel: Kernel, config: LaunchConfig, *arguments: Argument) -> None:
            if kernel.name == "planes_write":
                matrix.array[:] = np.random.default_rng(0).integers(0, 256, matrix.nbytes)
            super().launch(kernel, config, *arguments)

    meddler = Meddler()
    matrix = meddler.upload(floats("BF16", False, 20 * 640, "trained").tobytes())
    assert gpu.encode(meddler, matrix.address, "BF16", False, 20, 640) is not None


def test_refusals(queue: Queue) -> None:
    def encode(**changed: object) -> None:
        arguments = {"data": 4096, "kind": "BF16", "wide": False, "rows": 16, "cols": 64} | changed
        gpu.encode(queue, **arguments)  # type: ignore[arg-type]

    for changed, message in (
        ({"kind": "F64"}, "expected a kind among"),
        ({"kind": "F32", "wide": True}, "widened only BF16"),
        ({"rows": 0, "always": True}, "rows and 1 to"),
        ({"cols": 0, "always": True}, "rows and 1 to"),
        ({"rows": 1 << 35}, "rows and 1 to"),
        ({"rows_per_table": 24}, "multiple of 16"),
        ({"rows_per_table": -16}, "multiple of 16"),
        ({"row_stride": 63}, "row stride of at least 64"),
        ({"data": 4097}, "boundary of its elements' 2 bytes"),
        ({"cols": 1 << 29, "always": True}, "fewer than 2\\^32 elements"),
    ):
        with pytest.raises(UsageError, match=message):
            encode(**changed)
    for rows, cols in ((16, 1 << 29), (0, 64), (64, 0)):
        assert gpu.encode(queue, 4096, "BF16", False, rows, cols) is None
