"""The manifest ``bitforbit.json`` of a compressed directory (docs/format.md, section 4)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitforbit.errors import ManifestError, NotCompressedError
from bitforbit.format import jsontext
from bitforbit.format.checksum import SHA256_DIGITS, XXH3_128_DIGITS
from bitforbit.format.jsontext import Fields
from bitforbit.format.record import check_version, pack, unpack
from bitforbit.format.spec import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_REWRITTEN_BYTES,
)

Kind = Literal["shard", "rewritten", "copied"]
_KINDS: dict[str, Kind] = {"shard": "shard", "rewritten": "rewritten", "copied": "copied"}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: ``size`` (bytes) and ``sha256`` of the original, size and XXH3-128 of the stored one.

    ``original`` holds a rewritten file's original bytes, None for the other kinds.
    """

    path: str
    kind: Kind
    size: int
    sha256: str
    stored_size: int
    stored_xxh3_128: str
    original: bytes | None = None

    def to_json(self) -> dict[str, object]:
        """The JSON object of the manifest."""
        value: dict[str, object] = {"path": self.path, "kind": self.kind, "size": self.size, "sha256": self.sha256}
        if self.original is not None:
            value["original"] = pack(self.original)
        value["stored"] = {"size": self.stored_size, "xxh3_128": self.stored_xxh3_128}
        return value

    @classmethod
    def from_json(cls, value: object, where: str) -> FileEntry:
        """Inverse of :meth:`to_json`. Raises ManifestError."""
        fields = Fields(value, where)
        path = check_path(fields.text("path"), where)
        kind = _KINDS.get(fields.text("kind"))
        if kind is None:
            raise ManifestError(f"{where}: expected kind to be one of {', '.join(_KINDS)}, got {fields.text('kind')!r}")
        size = fields.size("size", MAX_HEADER_BYTES) if kind == "rewritten" else fields.size("size")
        original = unpack(fields.text("original"), size, f"{where}, 'original'") if kind == "rewritten" else None
        stored = fields.child("stored")
        digest = stored.digest("xxh3_128", XXH3_128_DIGITS)
        return cls(path, kind, size, fields.digest("sha256", SHA256_DIGITS), stored.size("size"), digest, original)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every file of a compressed directory, sorted by path, and the directories that hold none."""

    writer: str
    directories: Sequence[str]
    files: Sequence[FileEntry]

    def to_bytes(self) -> bytes:
        """Text of ``bitforbit.json``. Raises ManifestError for rewritten files that no reader takes: hundreds of MB."""
        _check_rewritten([entry.size for entry in self.files if entry.kind == "rewritten"], MANIFEST_NAME)
        value = {
            "format_version": FORMAT_VERSION,
            "writer": self.writer,
            "directories": sorted(self.directories),
            "files": [entry.to_json() for entry in sorted(self.files, key=lambda e: e.path)],
        }
        return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Inverse of :meth:`to_bytes`. Raises ManifestError or UnsupportedVersionError."""
        top = Fields(jsontext.parse(data, where=where, error=ManifestError, duplicate=ManifestError), where)
        check_version(top)
        _check_rewritten([_rewritten_bytes(value) for value in top.array("files")], where)
        files = [FileEntry.from_json(v, f"{where}, file {i}") for i, v in enumerate(top.array("files"))]
        directories: list[str] = []
        for value in top.array("directories"):
            if not isinstance(value, str):
                raise ManifestError(f"{where}: expected directories to be a list of paths, got {value!r}")
            directories.append(check_path(value, where))
        _check_tree([entry.path for entry in files], directories, where)
        return cls(top.text("writer"), directories, files)


def read_manifest(directory: Path) -> Manifest:
    """Manifest of a compressed directory. Raises NotCompressedError, ManifestError or UnsupportedVersionError."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise NotCompressedError(f"{directory}: expected a directory with {MANIFEST_NAME}, got none; compress it first")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, got {path.stat().st_size}")
    return Manifest.from_bytes(path.read_bytes(), os.fspath(path))


def check_path(path: str, where: str) -> str:
    """The path, if it is relative, normal and stays inside the directory. Raises ManifestError."""
    if not path or "\0" in path or not jsontext.is_unicode(path) or any(p in ("", ".", "..") for p in path.split("/")):
        raise ManifestError(f"{where}: expected a relative path without '..', got {path!r}; the manifest is damaged")
    return path


def _rewritten_bytes(value: object) -> int:
    """What an entry, not checked yet, says that its original inflates to."""
    if not isinstance(value, dict) or value.get("kind") != "rewritten" or not jsontext.is_size(value.get("size")):
        return 0
    return int(value["size"])


def _check_rewritten(sizes: Sequence[int], where: str) -> None:
    if sum(sizes) > MAX_REWRITTEN_BYTES:
        raise ManifestError(
            f"{where}: expected originals of at most {MAX_REWRITTEN_BYTES} bytes together in rewritten files "
            f"(config.json and indices), got {sum(sizes)}"
        )


def _check_tree(files: Sequence[str], directories: Sequence[str], where: str) -> None:
    seen = {MANIFEST_NAME}
    for path in files:
        if path in seen:
            raise ManifestError(f"{where}: expected every path once, got {path!r} again")
        seen.add(path)
    for path in [*files, *directories]:
        above = path.split("/")[:-1]
        for depth in range(1, len(above) + 1):
            if "/".join(above[:depth]) in seen:
                raise ManifestError(f"{where}: {path!r} lies below {'/'.join(above[:depth])!r}, which is a file")
    for path in directories:
        if path in seen:
            raise ManifestError(f"{where}: {path!r} is both a file and a directory")
