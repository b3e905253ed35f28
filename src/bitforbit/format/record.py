"""The record of a shard: the original file, and how each of its tensors is stored (docs/format.md, section 2)."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from bitforbit.errors import ChecksumError, ManifestError, UnsupportedVersionError
from bitforbit.format import checksum, jsontext
from bitforbit.format.jsontext import Fields
from bitforbit.format.spec import (
    FORMAT_VERSION,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    PART_ALIGNMENT,
    RAW_CODEC,
    RECORD_CHECKSUM_KEY,
    RECORD_KEY,
)


@dataclass(frozen=True, slots=True)
class OriginalFile:
    """The original safetensors file: size in bytes, checksums, and its header's JSON exactly as it was."""

    size: int
    sha256: str
    xxh3_128: str
    header: bytes


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """How one tensor is stored. For ``raw`` tensors only ``codec`` and ``xxh3_stored`` mean anything.

    ``parts`` maps part names to stored lengths in bytes, in the order in which they are stored.
    """

    codec: str
    xxh3_stored: str
    codec_version: int = 0
    dtype: str = ""
    shape: tuple[int, ...] = ()
    config: Mapping[str, int | str] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    xxh3_decoded: str = ""

    @property
    def is_raw(self) -> bool:
        """Whether the tensor is stored as it was."""
        return self.codec == RAW_CODEC

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts of a compressed tensor."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The record of one shard. ``tensors`` holds every tensor of the original file."""

    file: OriginalFile
    tensors: Mapping[str, TensorRecord]

    def metadata(self) -> dict[str, str]:
        """The two entries that a shard's ``__metadata__`` gains."""
        tensors = {name: _tensor_to_json(record) for name, record in self.tensors.items()}
        file = {
            "size": self.file.size,
            "sha256": self.file.sha256,
            "xxh3_128": self.file.xxh3_128,
            "header_size": len(self.file.header),
            "header": pack(self.file.header),
        }
        value = {"format_version": FORMAT_VERSION, "file": file, "tensors": tensors}
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return {RECORD_KEY: text, RECORD_CHECKSUM_KEY: checksum.xxh3_64([text.encode("utf-8")])}


def read_record(metadata: Mapping[str, str], where: str) -> ShardRecord:
    """Record from a shard's ``__metadata__``.

    Raises ManifestError (also where there is none), ChecksumError or UnsupportedVersionError.
    """
    text = metadata.get(RECORD_KEY)
    if text is None:
        raise ManifestError(
            f"{where}: expected a {RECORD_KEY!r} entry in __metadata__, got none; not a compressed shard"
        )
    expected, got = metadata.get(RECORD_CHECKSUM_KEY), checksum.xxh3_64([text.encode("utf-8")])
    if expected != got:
        raise ChecksumError(f"{where}: expected the record's XXH3-64 to be {expected}, got {got}; the file is damaged")
    where = f"{where}, record"
    top = Fields(jsontext.parse(text, where=where, error=ManifestError, duplicate=ManifestError), where)
    check_version(top)
    file = top.child("file")
    size = file.size("size")
    header_size = file.size("header_size", maximum=min(MAX_HEADER_BYTES, max(0, size - LENGTH_BYTES)))
    header = unpack(file.text("header"), header_size, f"{file.where}, 'header'")
    original = OriginalFile(size, file.digest("sha256", 64), file.digest("xxh3_128", 32), header)
    tensors = top.child("tensors")
    parsed = {name: _tensor_from_json(Fields(value, f"{where}, tensor {name!r}")) for name, value in tensors.items()}
    return ShardRecord(original, parsed)


def check_version(fields: Fields) -> None:
    """Refuse a format version that this release does not know. Raises UnsupportedVersionError."""
    version = fields.size("format_version")
    if version != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"{fields.where}: expected format version {FORMAT_VERSION}, got {version}; pip install --upgrade bitforbit"
        )


def pack(data: bytes) -> str:
    """Base64 of the zlib stream of the bytes."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def unpack(text: str, size: int, where: str) -> bytes:
    """Inverse of :func:`pack`, never inflating more than ``size`` + 1 bytes. Raises ManifestError."""
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error) as e:
        raise ManifestError(f"{where}: expected base64 of a zlib stream, got {e}; the file is damaged") from None
    if len(data) != size or not inflate.eof:
        got = f"more than {size}" if len(data) > size else len(data)
        raise ManifestError(f"{where}: expected a zlib stream of {size} bytes, got {got}; the file is damaged")
    return data


def _tensor_to_json(record: TensorRecord) -> dict[str, object]:
    if record.is_raw:
        return {"codec": RAW_CODEC, "xxh3_stored": record.xxh3_stored}
    return {
        "codec": record.codec,
        "codec_version": record.codec_version,
        "dtype": record.dtype,
        "shape": list(record.shape),
        "config": dict(record.config),
        "parts": dict(record.parts),
        "xxh3_stored": record.xxh3_stored,
        "xxh3_decoded": record.xxh3_decoded,
    }


def _tensor_from_json(fields: Fields) -> TensorRecord:
    codec, stored = fields.text("codec"), fields.digest("xxh3_stored", checksum.XXH3_64_DIGITS)
    if codec == RAW_CODEC:
        return TensorRecord(codec, stored)
    shape = fields.array("shape")
    if not all(map(jsontext.is_size, shape)):
        raise ManifestError(f"{fields.where}: expected shape to be a list of sizes, got {str(shape)[:80]}")
    config: dict[str, int | str] = {}
    for key, value in fields.child("config").items():
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ManifestError(f"{fields.where}: expected config to hold numbers and strings, got {key!r}: {value!r}")
        config[key] = value
    parts_fields = fields.child("parts")
    parts = {name: parts_fields.size(name) for name, _ in parts_fields.items()}
    if not parts or any(not name or length % PART_ALIGNMENT for name, length in parts.items()):
        raise ManifestError(f"{fields.where}: expected parts of multiples of {PART_ALIGNMENT} bytes, got {parts}")
    return TensorRecord(
        codec,
        stored,
        fields.size("codec_version"),
        fields.text("dtype"),
        tuple(d for d in shape if isinstance(d, int)),
        config,
        parts,
        fields.digest("xxh3_decoded", checksum.XXH3_64_DIGITS),
    )
