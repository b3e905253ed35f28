"""The safetensors header parser: every way to break a file has its own error."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitforbit import errors
from bitforbit.format.header import Header, TensorEntry, build_header, read_header
from helpers.models import gaussian, noise, safetensors_bytes, with_header


def parse(data: bytes) -> Header:
    return read_header(io.BytesIO(data))


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: Any, data: bytes = b"1234") -> bytes:
    return with_header(header if isinstance(header, bytes) else json.dumps(header).encode(), data)


def test_reads_what_is_there() -> None:
    data = safetensors_bytes({"a": gaussian((3, 5)), "b": noise("U8", (7,))}, {"k": "v"})
    header = parse(data)
    assert header.metadata == {"k": "v"}
    assert header.tensors == (TensorEntry("a", "BF16", (3, 5), 0, 30), TensorEntry("b", "U8", (7,), 30, 37))
    assert header.file_size == len(data)
    assert data[8 : header.data_start] == header.raw_json


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F4", (2, 3), 3),
        ("F6_E2M3", (4,), 3),
        ("F64", (), 8),
        ("F8_E8M0", (3,), 3),
        ("C64", (2,), 16),
        ("BF16", (0, 9), 0),
    ],
)
def test_odd_dtypes_and_shapes(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    header = parse(file_of({"t": entry(dtype, shape, (0, nbytes))}, b"x" * nbytes))
    assert header.tensors[0].nbytes == nbytes


def test_empty_tensors_lie_between_others() -> None:
    header = parse(file_of({"z": entry(shape=(0,), offsets=(2, 2)), "b": entry(shape=(2,), offsets=(2, 4)),
                            "a": entry(shape=(2,), offsets=(0, 2))}))  # fmt: skip
    assert [e.name for e in header.by_offset()] == ["a", "z", "b"]


@pytest.mark.parametrize("text", [b"{}", b"  {} ", b'{"__metadata__":null}', b'{"__metadata__":{}}'])
def test_no_tensors(text: bytes) -> None:
    assert parse(with_header(text, b"")).tensors == ()


BAD = {
    "empty file": (b"", errors.TruncatedFileError),
    "seven bytes": (b"1234567", errors.TruncatedFileError),
    "header longer than file": ((99).to_bytes(8, "little") + b"{}", errors.HeaderSizeError),
    "header over 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", errors.HeaderSizeError),
    "header length -1": (b"\xff" * 8 + b"{}", errors.HeaderSizeError),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", errors.HeaderSizeError),
    "no header": (with_header(b"", b""), errors.HeaderSyntaxError),
    "not utf-8": (with_header(b'{"\xff":1}', b""), errors.HeaderSyntaxError),
    "not json": (with_header(b"{", b""), errors.HeaderSyntaxError),
    "NaN": (file_of(b'{"a":NaN}'), errors.HeaderSyntaxError),
    "a list": (with_header(b"[]", b""), errors.HeaderSyntaxError),
    "deep nesting": (with_header(b'{"a":' + b"[" * 100_000, b""), errors.HeaderSyntaxError),
    "deep nesting, closed": (with_header(b"[" * 99_000 + b"]" * 99_000, b""), errors.HeaderSyntaxError),
    "huge integer": (file_of(b'{"a":' + b"9" * 10_000 + b"}"), errors.HeaderSyntaxError),
    "tensor is a number": (file_of({"a": 1}), errors.HeaderSyntaxError),
    "no dtype": (file_of({"a": {"shape": [4], "data_offsets": [0, 4]}}), errors.HeaderSyntaxError),
    "dtype is a list": (file_of({"a": entry(dtype=["U8"])}), errors.HeaderSyntaxError),
    "shape is text": (file_of({"a": entry(shape="4")}), errors.HeaderSyntaxError),
    "negative dimension": (file_of({"a": entry(shape=[-4])}), errors.HeaderSyntaxError),
    "dimension true": (file_of({"a": entry(shape=[True, 4])}), errors.HeaderSyntaxError),
    "dimension 4.0": (file_of({"a": entry(shape=[4.0])}), errors.HeaderSyntaxError),
    "dimension 2^63": (file_of({"a": entry(shape=[1 << 63])}), errors.HeaderSyntaxError),
    "negative offset": (file_of({"a": entry(offsets=[-1, 3])}), errors.HeaderSyntaxError),
    "three offsets": (file_of({"a": entry(offsets=[0, 4, 4])}), errors.HeaderSyntaxError),
    "offset false": (file_of({"a": entry(offsets=[False, 4])}), errors.HeaderSyntaxError),
    "metadata number": (file_of({"__metadata__": {"a": 1}}, b""), errors.HeaderSyntaxError),
    "metadata list": (file_of({"__metadata__": []}, b""), errors.HeaderSyntaxError),
    "lone surrogate": (file_of(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}"), errors.HeaderSyntaxError),
    "duplicate": (file_of(b'{"a":1,"a":1}'), errors.DuplicateKeyError),
    "duplicate member": (file_of(b'{"a":{"dtype":"U8","dtype":"U8"}}'), errors.DuplicateKeyError),
    "unknown dtype": (file_of({"a": entry(dtype="Q5")}), errors.UnknownDtypeError),
    "too small": (file_of({"a": entry(shape=[5])}), errors.TensorSizeError),
    "half a byte": (file_of({"a": entry(dtype="F4", shape=[7])}), errors.TensorSizeError),
    "product overflows": (file_of({"a": entry(shape=[1 << 62, 1 << 62])}), errors.TensorSizeError),
    "a million dimensions": (file_of({"a": entry(shape=[1 << 62] * 10_000)}), errors.TensorSizeError),
    "end before begin": (file_of({"a": entry(offsets=[4, 0])}), errors.OffsetRangeError),
    "beyond the end": (file_of({"a": entry(offsets=[8, 12])}), errors.OffsetRangeError),
    "file cut": (file_of({"a": entry()}, b"123"), errors.TruncatedFileError),
    "overlap": (file_of({"a": entry(), "b": entry(shape=[2], offsets=[2, 4])}), errors.OverlappingTensorsError),
    "empty inside": (file_of({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}), errors.OverlappingTensorsError),
    "gap": (file_of({"a": entry(shape=[1], offsets=[0, 1]), "b": entry(shape=[1], offsets=[3, 4])}),
            errors.UncoveredBytesError),
    "gap in front": (file_of({"b": entry(shape=[1], offsets=[3, 4])}), errors.UncoveredBytesError),
    "trailing": (file_of({"a": entry()}, b"12345"), errors.UncoveredBytesError),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    data, error = BAD[name]
    with pytest.raises(errors.FormatError) as caught:
        parse(data)
    assert caught.type is error


def test_refuses_from_path_with_the_path_in_the_message(tmp_path: Any) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"123")
    with pytest.raises(errors.TruncatedFileError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_build_header_aligns_and_pads() -> None:
    entries = [TensorEntry("ä", "U8", (4,), 0, 4)]
    built = build_header(entries, {"k": "v"})
    assert len(built) % 64 == 0
    header = parse(built + b"1234")
    assert list(header.tensors) == entries
    assert header.metadata == {"k": "v"}
    assert len(build_header(entries, {}, 1024)) == 1024
    with pytest.raises(errors.HeaderSizeError):
        build_header(entries, {"k": "v" * 100}, 128)


VALID = safetensors_bytes({"a.weight": gaussian((4, 8)), "b": noise("I64", (2,))}, {"format": "pt"})


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 49), st.integers(0, 255)), min_size=1, max_size=8))
def test_mutated_headers_raise_nothing_else(changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    with contextlib.suppress(errors.BitforbitError):
        parse(bytes(data))
