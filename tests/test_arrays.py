"""Arrays in memory: every dtype, shape and bit pattern, rows, byte strings, pickles, torch."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import bitforbit
from bitforbit import dtypes, errors
from bitforbit.arrays import Encoded, encode
from bitforbit.codecs.planes import naive
from bitforbit.codecs.planes.layout import Layout

CODED = [np.dtype(t) for t in (ml_dtypes.bfloat16, "f2", "f4", ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)]
OTHERS = [
    np.dtype(t)
    for t in (
        *("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f8", "c8"),
        *(ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz),
    )
]
BF16 = np.dtype(ml_dtypes.bfloat16)


def assert_bitwise_equal(got: np.ndarray, expected: np.ndarray) -> None:
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    a, b = (np.frombuffer(x.tobytes(), np.uint8) for x in (got, expected))
    different = np.flatnonzero(a != b)
    assert not different.size, f"first difference at byte {different[0]}: {a[different[0]]} != {b[different[0]]}"


def gaussian(shape: tuple[int, ...], dtype: np.dtype = BF16, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(dtype)


def random_bits(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, np.uint8)
    if dtype == np.bool_:
        data &= 1
    return data.view(dtype).reshape(shape)


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


# --- byte strings ----------------------------------------------------------------------------------------------------


def seal(data: bytes) -> bytes:
    """The same bytes with a right checksum."""
    return data[:16] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:16] + data[24:])) + data[24:]


def with_header(data: bytes, **changes: object) -> bytes:
    """The same array with members of the header replaced, and a right checksum."""
    size = struct.unpack_from("<I", data, 12)[0]
    text = json.dumps({**json.loads(data[24 : 24 + size]), **changes}).encode()
    text = text.ljust(len(text) + -(24 + len(text)) % 64)
    return seal(data[:12] + struct.pack("<I", len(text)) + bytes(8) + text + data[24 + size :])


@pytest.mark.parametrize("convert", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint16)])
def test_buffers(convert: type) -> None:
    array = gaussian((50, 100))
    assert_bitwise_equal(Encoded.from_bytes(convert(encode(array).to_bytes())).decode(), array)


@pytest.mark.parametrize("data", [None, 3, "text", np.zeros((4, 4))[:, 1]])
def test_what_is_no_buffer(data: object) -> None:
    with pytest.raises(errors.UsageError):
        Encoded.from_bytes(data)


def test_every_flipped_byte_and_every_cut_is_refused() -> None:
    data = encode(gaussian((16, 64))).to_bytes()
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 1 + i % 255
        with pytest.raises(errors.FormatError):
            Encoded.from_bytes(damaged)
        with pytest.raises(errors.FormatError):
            Encoded.from_bytes(data[:i])
    with pytest.raises(errors.FormatError):
        Encoded.from_bytes(data + b"\0")


DIGITS = {"kind": "BF16", "rows": 16, "cols": 64, "rows_per_table": 16}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dtype": "F7"}, errors.UnknownDtypeError),
        ({"dtype": "F4"}, errors.UnknownDtypeError),
        ({"dtype": 3}, errors.ManifestError),
        ({"dtype": "F16"}, errors.CorruptTensorError),
        ({"shape": [1 << 40, 1 << 40]}, errors.TensorSizeError),
        ({"shape": [0, 1 << 62, 1 << 62]}, errors.TensorSizeError),
        ({"shape": [-16, -64]}, errors.TensorSizeError),
        ({"shape": [16.0, 64]}, errors.TensorSizeError),
        ({"shape": [True, 1024]}, errors.TensorSizeError),
        ({"shape": [1] * 65}, errors.TensorSizeError),
        ({"shape": "16"}, errors.ManifestError),
        ({"shape": [16, 65]}, errors.CorruptTensorError),
        ({"shape": [1 << 30, 64], "config": {**DIGITS, "rows": 1 << 30}}, errors.CorruptTensorError),
        ({"config": {**DIGITS, "kind": "F32"}}, errors.CorruptTensorError),
        ({"config": {**DIGITS, "rows": -16}}, errors.ManifestError),
        ({"config": {**DIGITS, "rows": [16]}}, errors.ManifestError),
        ({"config": {**DIGITS, "rows_per_table": 3}}, errors.CorruptTensorError),
        ({"config": {}}, errors.CorruptTensorError),
        ({"codec": "zip"}, errors.UnsupportedVersionError),
        ({"codec": "raw"}, errors.TensorSizeError),
        ({"codec": "planes", "codec_version": 99}, errors.UnsupportedVersionError),
        ({"codec_version": 0}, errors.UnsupportedVersionError),
        ({"parts": {}}, errors.TensorSizeError),
        ({"parts": {"code": 1 << 62}}, errors.TruncatedFileError),
        ({"parts": []}, errors.ManifestError),
        ({"library": None}, errors.ManifestError),
    ],
)
def test_hostile_headers(changes: dict[str, object], error: type[errors.FormatError]) -> None:
    data = encode(gaussian((16, 64))).to_bytes()
    assert_bitwise_equal(Encoded.from_bytes(with_header(data)).decode(), encode(gaussian((16, 64))).decode())
    with pytest.raises(error):
        Encoded.from_bytes(with_header(data, **changes))


def test_an_unknown_library_becomes_numpy() -> None:
    data = with_header(encode(gaussian((16, 64))).to_bytes(), library="other", new_member=[1])
    assert Encoded.from_bytes(data).library == "numpy"


def test_header_texts() -> None:
    data = encode(gaussian((16, 64))).to_bytes()
    size = struct.unpack_from("<I", data, 12)[0]
    for text in (b"[" * size, b" " * size, b"{}".ljust(size), b"\xff" * size, b'{"a":1,"a":2}'.ljust(size)):
        with pytest.raises(errors.FormatError):
            Encoded.from_bytes(seal(data[:24] + text + data[24 + size :]))
    with pytest.raises(errors.HeaderSizeError):
        Encoded.from_bytes(seal(data[:12] + struct.pack("<I", 0xFFFFFFE8) + data[16:]))
    with pytest.raises(errors.UnsupportedVersionError):
        Encoded.from_bytes(seal(data[:8] + struct.pack("<I", 2) + data[12:]))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_behind_a_right_checksum_never_crashes(data: st.DataObject) -> None:
    blob = bytearray(encode(gaussian((20, 100))).to_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        blob[data.draw(st.integers(24, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        encoded = Encoded.from_bytes(seal(bytes(blob)))
        encoded.decode(rows=(0, min(3, encoded.shape[0])))
        encoded.decode()
    except errors.FormatError:
        pass


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(errors.FormatError):
        Encoded.from_bytes(data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_round_trip(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(CODED + OTHERS))
    shape = tuple(data.draw(st.lists(st.integers(0, 40), max_size=4)))
    spread = data.draw(st.sampled_from([0, 1e-6, 0.02, 3.0, 1e4]))
    seed = data.draw(st.integers(0, 1000))
    if dtype in CODED and spread:
        with np.errstate(over="ignore"):
            array = (np.random.default_rng(seed).standard_normal(shape) * spread).astype(dtype)
    else:
        array = random_bits(shape, dtype, seed)
    encoded = encode(np.asarray(array), threads=data.draw(st.integers(1, 3)))
    assert encoded.nbytes <= array.nbytes
    assert_bitwise_equal(encoded.decode(), np.asarray(array))
    again = pickle.loads(pickle.dumps(encoded))
    if shape and shape[0]:
        begin = data.draw(st.integers(0, shape[0]))
        end = data.draw(st.integers(begin, shape[0]))
        assert_bitwise_equal(again.decode(rows=(begin, end)), array[begin:end])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(protocol: int) -> None:
    array = gaussian((30, 100))
    again = pickle.loads(pickle.dumps(encode(array), protocol))
    assert_bitwise_equal(again.decode(), array)


# --- the package -----------------------------------------------------------------------------------------------------


def test_public_names_are_lazy() -> None:
    code = (
        "import sys, bitforbit\n"
        "assert not {'numpy', 'typer', 'torch', 'rich'} & set(sys.modules)\n"
        "assert set(bitforbit.__all__) <= set(dir(bitforbit))\n"
        "for name in bitforbit.__all__: getattr(bitforbit, name)\n"
        "assert 'torch' not in sys.modules and 'typer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = bitforbit.nonsense


# --- torch -----------------------------------------------------------------------------------------------------------


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    names = (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "float64", "complex64", "uint16", "uint32", "uint64"),
        *("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    )
    for name, shape in itertools.product(names, [(), (0, 3), (65,), (33, 130)]):
        dtype = getattr(torch, name)
        words = torch.randint(0, 2 if name == "bool" else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensor = words.view(dtype).reshape(shape)
        if name in ("bfloat16", "float16", "float32") and shape == (33, 130):
            tensor = (torch.randn(shape) * 0.02).to(dtype)
        encoded = encode(tensor)
        assert encoded.library == "torch"
        for got in (encoded.decode(), Encoded.from_bytes(encoded.to_bytes()).decode()):
            assert isinstance(got, torch.Tensor)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        if shape == (33, 130):
            assert encoded.decode(rows=(3, 20)).shape == (17, 130)


def test_torch_views_parameters_and_out() -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.randn(64, 96).to(torch.bfloat16))
    encoded = encode(parameter.T)
    assert torch.equal(encoded.decode(), parameter.T)
    assert not encoded.decode().requires_grad
    out = torch.empty(96, 64, dtype=torch.bfloat16)
    assert encoded.decode(out) is out
    assert torch.equal(out, parameter.T)
    array = np.empty((96, 64), BF16)
    encoded.decode(array)
    assert torch.equal(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16), out)
    with pytest.raises(errors.UsageError):
        encoded.decode(torch.empty(64, 96, dtype=torch.bfloat16).T)
    conjugate = torch.randn(5, 2, dtype=torch.complex64).conj()
    assert torch.equal(encode(conjugate).decode(), conjugate)
    with pytest.raises(errors.UsageError, match="contiguous"):
        encode(conjugate).decode(torch.empty_like(conjugate).conj())


def test_torch_tensors_elsewhere() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(errors.UsageError, match="CPU memory"):
        encode(torch.empty(3, device="meta"))
    with pytest.raises(errors.UsageError, match="dense"):
        encode(torch.eye(3).to_sparse())
    with pytest.raises(errors.UnsupportedDtypeError):
        encode(torch.zeros(3, dtype=torch.complex128))


def test_a_torch_array_without_torch(tmp_path: object) -> None:
    data = with_header(encode(gaussian((16, 64))).to_bytes(), library="torch")
    code = (
        "import sys, numpy, ml_dtypes, bitforbit\n"
        "encoded = bitforbit.Encoded.from_bytes(sys.stdin.buffer.read())\n"
        "out = numpy.empty((16, 64), ml_dtypes.bfloat16)\n"
        "encoded.decode(out)\n"
        "assert 'torch' not in sys.modules\n"
        "try: encoded.decode()\n"
        "except bitforbit.errors.MissingDependencyError: sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], input=data).returncode == 7


def test_the_example_of_the_format_document() -> None:
    document = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    section = document.partition("## 6. Serialized arrays")[2]
    dump = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} )*[0-9a-f]{2})", section, re.MULTILINE)
    assert encode(np.array([1, 2, 3], "u1")).to_bytes() == bytes.fromhex(" ".join(dump))
