"""Arrays as byte strings and pickles: round trips, and everything that must be refused."""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from array_helpers import CODED, OTHERS, assert_bitwise_equal, gaussian, random_bits, seal, with_header
from bitforbit import errors
from bitforbit.arrays import Encoded, encode


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


def test_the_example_of_the_format_document() -> None:
    document = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    section = document.partition("## 6. Serialized arrays")[2]
    dump = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} )*[0-9a-f]{2})", section, re.MULTILINE)
    assert encode(np.array([1, 2, 3], "u1")).to_bytes() == bytes.fromhex(" ".join(dump))
