"""What the tests of arrays share: dtypes, arrays, comparison, and byte strings with other headers."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import xxhash

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


def seal(data: bytes) -> bytes:
    """The same bytes with a right checksum."""
    return data[:16] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:16] + data[24:])) + data[24:]


def with_header(data: bytes, **changes: object) -> bytes:
    """The same array with members of the header replaced, and a right checksum."""
    size = struct.unpack_from("<I", data, 12)[0]
    text = json.dumps({**json.loads(data[24 : 24 + size]), **changes}).encode()
    text = text.ljust(len(text) + -(24 + len(text)) % 64)
    return seal(data[:12] + struct.pack("<I", len(text)) + bytes(8) + text + data[24 + size :])
