"""Arrays in memory: every dtype, shape and bit pattern, rows, arguments."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys

import numpy as np
import pytest

import bitforbit
from array_helpers import BF16, CODED, OTHERS, assert_bitwise_equal, gaussian, random_bits
from bitforbit import dtypes, errors
from bitforbit.arrays import Encoded, encode
from bitforbit.codecs.planes import naive
from bitforbit.codecs.planes.layout import Layout


@pytest.mark.parametrize("dtype", CODED + OTHERS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (63,), (64,), (65,), (17, 65), (3, 5, 7, 2), (70001,)])
def test_every_dtype_and_shape(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    for array in (random_bits(shape, dtype), gaussian(shape, dtype) if dtype in CODED else random_bits(shape, dtype)):
        encoded = encode(array, threads=2)
        assert encoded.shape == shape
        assert encoded.dtype == dtypes.from_numpy(dtype)
        assert encoded.original_nbytes == array.nbytes
        assert_bitwise_equal(encoded.decode(threads=2), array)
        assert_bitwise_equal(Encoded.from_bytes(encoded.to_bytes()).decode(), array)


@pytest.mark.parametrize("dtype", [d for d in CODED if d.itemsize <= 2], ids=str)
def test_all_bit_patterns(dtype: np.dtype) -> None:
    """All 65,536 (or 256) patterns, among enough ordinary weights that the codec is used."""
    word = np.dtype(f"u{dtype.itemsize}")
    patterns = np.arange(1 << 8 * dtype.itemsize).astype(word).view(dtype)
    array = np.concatenate([patterns, gaussian((1 << 20,), dtype)]).reshape(-1, 64)
    encoded = encode(array)
    assert encoded.codec == "planes"
    assert_bitwise_equal(encoded.decode(), array)


def test_special_values_of_float32() -> None:
    words = [0, 1 << 31, 1, 0x007FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FBFFFFF]
    array = np.concatenate([np.array(words, "u4").view("f4"), gaussian((100_000,), np.dtype("f4"))])
    assert_bitwise_equal(encode(array).decode(), array)


def test_widened_bf16_takes_the_space_of_bf16() -> None:
    narrow = gaussian((256, 256))
    assert encode(narrow.astype("f4")).nbytes == encode(narrow).nbytes
    assert_bitwise_equal(encode(narrow.astype("f4")).decode(), narrow.astype("f4"))


def test_agrees_with_the_naive_reference() -> None:
    array = gaussian((37, 130))
    encoded = encode(array)
    header_bytes = struct.unpack_from("<I", encoded.to_bytes(), 12)[0]
    header = json.loads(encoded.to_bytes()[24 : 24 + header_bytes])
    layout = Layout.from_config(header["config"], header["dtype"], tuple(header["shape"]))
    at, parts = 24 + header_bytes, {}
    for name, size in header["parts"].items():
        parts[name] = np.frombuffer(encoded.to_bytes(), np.uint8, size, at)
        at += size
    words = naive.decode(parts, layout)
    np.testing.assert_array_equal(words, array.reshape(-1).view(np.uint16))


def test_size_of_gaussian_weights() -> None:
    encoded = encode(gaussian((1024, 1024)))
    assert 10.5 < encoded.bits_per_weight < 10.75
    assert encoded.nbytes < len(encoded.to_bytes()) < encoded.nbytes + 1024
    assert "10.6" in repr(encoded) or "10.7" in repr(encoded)


def test_unusual_memory() -> None:
    base = gaussian((200, 300))
    read_only = base.copy()
    read_only.flags.writeable = False
    for array in (base.T, base[::3, ::-2], base[:, 5:6], read_only, np.asfortranarray(base), base[None]):
        assert_bitwise_equal(encode(array).decode(), np.ascontiguousarray(array).reshape(array.shape))


@pytest.mark.parametrize("dtype", [BF16, np.dtype("i4")], ids=str)
def test_later_changes_of_the_array_do_not_matter(dtype: np.dtype) -> None:
    array = np.ones((100, 100), dtype)
    encoded = encode(array)
    array[:] = 0
    assert (encoded.decode() == 1).all()


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(100, 640), (100, 70), (3000,), (70001,), (1 << 17,), (40, 3, 3, 8), (20, 40, 9), (1, 5000)]
)
def test_rows_are_slices(shape: tuple[int, ...]) -> None:
    array = gaussian(shape)
    encoded = encode(array)
    assert encoded.codec == "planes"
    n = shape[0]
    for begin, end in itertools.combinations_with_replacement(sorted({0, 1, n // 3, n // 2 + 1, n - 1, n}), 2):
        if end <= n:
            assert_bitwise_equal(encoded.decode(rows=(begin, end), threads=2), array[begin:end])
            assert_bitwise_equal(encoded.decode(rows=slice(begin, end)), array[begin:end])
    for rows in (slice(None), slice(-1, None), slice(5, 2), slice(None, -1), slice(0, 10**9)):
        assert_bitwise_equal(encoded.decode(rows=rows), array[rows])


def test_rows_of_a_raw_array() -> None:
    array = random_bits((50, 3), np.dtype("i8"))
    assert_bitwise_equal(encode(array).decode(rows=(7, 9)), array[7:9])


@pytest.mark.parametrize("rows", [(0, 11), (-1, 3), (5, 4), slice(0, 10, 2), 3, (1,), (1, 2, 3), "ab", (0.0, 1.0)])
def test_bad_rows(rows: object) -> None:
    with pytest.raises(errors.UsageError, match="rows"):
        encode(gaussian((10, 100))).decode(rows=rows)  # type: ignore[arg-type]


def test_no_rows_without_dimensions() -> None:
    with pytest.raises(errors.UsageError, match="without dimensions"):
        encode(gaussian(())).decode(rows=(0, 1))


def test_rows_read_only_their_blocks() -> None:
    """Damage in one block does not reach the rows of another one."""
    encoded = encode(gaussian((64, 1024)))
    parts = dict(encoded._tensor.parts)
    digits = parts["digits"].copy()
    digits[: digits.size // 4] ^= 0xFF
    parts["digits"] = digits
    tensor = type(encoded._tensor)("planes", 1, "BF16", (64, 1024), encoded._tensor.config, parts)
    damaged = Encoded(tensor, "numpy")
    assert_bitwise_equal(damaged.decode(rows=(16, 64)), encoded.decode(rows=(16, 64)))
    with pytest.raises(errors.CorruptTensorError):
        damaged.decode(rows=(0, 16))


# --- out and arguments -----------------------------------------------------------------------------------------------


def test_out_is_filled_and_returned() -> None:
    array = gaussian((40, 100))
    encoded = encode(array)
    out = np.empty_like(array)
    assert encoded.decode(out) is out
    assert_bitwise_equal(out, array)
    assert encoded.decode(out=out[5:9], rows=(20, 24)) is not out
    assert_bitwise_equal(out[5:9], array[20:24])


@pytest.mark.parametrize(
    "out",
    [
        np.empty((40, 99), BF16),
        np.empty((4000,), BF16),
        np.empty((40, 100), "u2"),
        np.empty((100, 40), BF16).T,
        np.broadcast_to(np.zeros((), BF16), (40, 100)),
        [0] * 4000,
    ],
    ids=["shape", "rank", "dtype", "strided", "read-only", "list"],
)
def test_bad_out(out: object) -> None:
    with pytest.raises(errors.UsageError):
        encode(gaussian((40, 100))).decode(out)


@pytest.mark.parametrize(
    "array",
    [
        [1.0],
        1.0,
        None,
        np.ma.masked_array([1.0]),
        np.array(["a"]),
        np.array([object()]),
        np.zeros(3, ">f4"),
        np.zeros(3, "c16"),
    ],
    ids=["list", "float", "none", "masked", "text", "object", "big-endian", "complex128"],
)
def test_bad_arrays(array: object) -> None:
    with pytest.raises(errors.UsageError):
        encode(array)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_bad_threads(threads: object) -> None:
    with pytest.raises(errors.UsageError, match="threads"):
        encode(gaussian((4, 4)), threads=threads)  # type: ignore[arg-type]


def test_threads_do_not_change_anything() -> None:
    array = gaussian((513, 200))
    assert len({encode(array, threads=n).to_bytes() for n in (1, 2, 3, 8)}) == 1


# --- the package ---------------------------------------------------------------------------------------------------


def test_public_names_are_lazy() -> None:
    code = (
        "import sys, bitforbit\n"
        "assert not {'numpy', 'typer', 'torch', 'rich'} & set(sys.modules)\n"
        "assert set(bitforbit.__all__) <= set(dir(bitforbit))\n"
        "models = {'BitforbitConfig', 'KiviCache', 'compress_model', 'decompress_model', 'kivi_cache'}\n"
        "for name in set(bitforbit.__all__) - models: getattr(bitforbit, name)\n"
        "assert 'torch' not in sys.modules and 'typer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = bitforbit.nonsense


def test_modules_need_no_import_of_their_own() -> None:
    code = "import bitforbit as b; b.nn.set_layout, b.ops.gpu, b.attention, b.cpu, b.iomodel, b.kv"
    subprocess.run([sys.executable, "-c", code], check=True)
