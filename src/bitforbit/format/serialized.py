"""Byte strings that hold one array (docs/format.md, section 6): preamble, JSON header, parts."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.errors import (
    ChecksumError,
    HeaderSizeError,
    HeaderSyntaxError,
    TensorSizeError,
    TruncatedFileError,
    UnsupportedVersionError,
)
from bitforbit.format.checksum import xxh3_64
from bitforbit.format.jsontext import MAX_INTEGER, Fields, parse

MAGIC = b"B4BARRAY"
VERSION = 1
ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 16
MAX_RANK = 64
"""Numpy has no arrays of more dimensions."""

_WHERE = "serialized array"
_PREAMBLE = struct.Struct("<8sIIQ")  # [0:8] magic, [8:12] version, [12:16] header bytes, [16:24] XXH3-64 of the rest
_CHECKSUM_BEGIN, _CHECKSUM_END = 16, 24

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SerializedArray:
    """One array as it is stored. The fields are those of a record's tensor; library is what the array came from."""

    codec: str
    codec_version: int
    dtype: str
    shape: tuple[int, ...]
    config: Mapping[str, int | str]
    parts: Mapping[str, Bytes]
    library: str

    def to_bytes(self) -> bytes:
        """The byte string."""
        header = {
            "codec": self.codec,
            "codec_version": self.codec_version,
            "config": dict(self.config),
            "dtype": self.dtype,
            "library": self.library,
            "parts": {name: part.nbytes for name, part in self.parts.items()},
            "shape": list(self.shape),
        }
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        text = text.ljust(len(text) + -(_PREAMBLE.size + len(text)) % ALIGNMENT)
        parts = [part.data for part in self.parts.values()]
        front = _PREAMBLE.pack(MAGIC, VERSION, len(text), 0)[:_CHECKSUM_BEGIN]
        checksum = bytes.fromhex(xxh3_64([front, text, *parts]))[::-1]
        return b"".join([front, checksum, text, *parts])

    @classmethod
    def from_bytes(cls, data: Bytes) -> SerializedArray:
        """Parse a byte string; the parts are views of ``data``, not copies.

        Only what is common to all codecs is checked. Raises a FormatError: TruncatedFileError, HeaderSizeError,
        HeaderSyntaxError, DuplicateKeyError, ManifestError, UnsupportedVersionError, UnknownDtypeError,
        TensorSizeError or ChecksumError.
        """
        if data.nbytes < _PREAMBLE.size:
            raise TruncatedFileError(f"{_WHERE}: expected at least {_PREAMBLE.size} bytes, got {data.nbytes}")
        magic, version, header_bytes, checksum = _PREAMBLE.unpack(data[: _PREAMBLE.size].tobytes())
        if magic != MAGIC:
            raise HeaderSyntaxError(f"{_WHERE}: expected the bytes to begin with {MAGIC!r}, got {magic!r}")
        if version != VERSION:
            raise UnsupportedVersionError(
                f"{_WHERE}: expected version {VERSION}, got {version}; pip install --upgrade bitforbit"
            )
        begin = _PREAMBLE.size + header_bytes
        if header_bytes > MAX_HEADER_BYTES or begin % ALIGNMENT:
            raise HeaderSizeError(
                f"{_WHERE}: expected a header of at most {MAX_HEADER_BYTES} bytes that ends on a {ALIGNMENT}-byte "
                f"boundary, got {header_bytes} bytes"
            )
        if begin > data.nbytes:
            raise TruncatedFileError(f"{_WHERE}: expected a header of {header_bytes} bytes, got {data.nbytes} in all")
        text = data[_PREAMBLE.size : begin].tobytes()
        fields = Fields(parse(text, where=_WHERE, error=HeaderSyntaxError, duplicate=HeaderSyntaxError), _WHERE)
        sizes = [(name, fields.child("parts").size(name)) for name, _ in fields.child("parts").items()]
        expected = begin + sum(size for _, size in sizes)
        if data.nbytes < expected:
            raise TruncatedFileError(f"{_WHERE}: expected {expected} bytes, got {data.nbytes}")
        if data.nbytes > expected:
            raise TensorSizeError(f"{_WHERE}: expected {expected} bytes, got {data.nbytes - expected} more")
        got = xxh3_64([data[:_CHECKSUM_BEGIN], data[_CHECKSUM_END:]])
        if got != f"{checksum:016x}":
            raise ChecksumError(f"{_WHERE}: expected XXH3-64 {checksum:016x}, got {got}; the bytes are damaged")
        parts: dict[str, Bytes] = {}
        for name, size in sizes:
            parts[name] = data[begin : begin + size]
            begin += size
        dtype = fields.text("dtype")
        return cls(
            codec=fields.text("codec"),
            codec_version=fields.size("codec_version"),
            dtype=dtype,
            shape=_checked_shape(fields.array("shape"), dtypes.bits(dtype)),
            config=_checked_config(fields.child("config")),
            parts=parts,
            library=fields.text("library"),
        )


def _checked_shape(shape: Sequence[object], width: int) -> tuple[int, ...]:
    dims = tuple(n for n in shape if type(n) is int and n >= 0)
    if len(dims) != len(shape) or len(dims) > MAX_RANK or math.prod(max(n, 1) for n in dims) * width > MAX_INTEGER:
        raise TensorSizeError(
            f"{_WHERE}: expected a shape of at most {MAX_RANK} dimensions and 2**63 bits, got {shape!s:.200}"
        )
    return dims


def _checked_config(config: Fields) -> dict[str, int | str]:
    checked: dict[str, int | str] = {}
    for key, value in config.items():
        if isinstance(value, str):
            checked[key] = config.text(key)
        else:
            checked[key] = config.size(key)
    return checked
