"""Records and manifests from files that nobody vouches for."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest

from bitforbit import errors
from bitforbit.format import checksum
from bitforbit.format.manifest import FileEntry, Manifest
from bitforbit.format.record import OriginalFile, ShardRecord, TensorRecord, pack, read_record, unpack
from bitforbit.format.spec import MAX_HEADER_BYTES, part_name

RECORD = ShardRecord(
    OriginalFile(1000, "a" * 64, "b" * 32, b"{}  "),
    {
        "x.weight": TensorRecord("planes", "c" * 16, 1, "BF16", (2, 3), {"k": 1}, {"code": 64}, "d" * 16),
        "y": TensorRecord("raw", "e" * 16),
    },
)


def test_record_round_trip() -> None:
    assert read_record(RECORD.metadata(), "here") == RECORD


def broken(change: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, str]:
    value = json.loads(RECORD.metadata()["bitforbit"])
    place = value
    for key in path:
        place = place[key]
    for key, new in change.items():
        if new is None:
            del place[key]
        else:
            place[key] = new
    return signed(json.dumps(value))


def signed(text: str) -> dict[str, str]:
    return {"bitforbit": text, "bitforbit_xxh3": checksum.xxh3_64([text.encode()])}


TENSOR = ("tensors", "x.weight")
BAD_RECORDS = {
    "none": ({}, errors.ManifestError),
    "unsigned": ({"bitforbit": "{}"}, errors.ChecksumError),
    "not json": (signed("{"), errors.ManifestError),
    "deep": (signed("[" * 100_000), errors.ManifestError),
    "list": (signed("[]"), errors.ManifestError),
    "duplicate": (signed('{"format_version":1,"format_version":1}'), errors.ManifestError),
    "newer": (broken({"format_version": 2}), errors.UnsupportedVersionError),
    "version true": (broken({"format_version": True}), errors.ManifestError),
    "no file": (broken({"file": None}), errors.ManifestError),
    "short digest": (broken({"sha256": "ab"}, ("file",)), errors.ManifestError),
    "negative size": (broken({"size": -1}, ("file",)), errors.ManifestError),
    "header larger than file": (broken({"header_size": 993}, ("file",)), errors.ManifestError),
    "header size wrong": (broken({"header_size": 3}, ("file",)), errors.ManifestError),
    "not base64": (broken({"header": "!!"}, ("file",)), errors.ManifestError),
    "not ascii": (broken({"header": "ä"}, ("file",)), errors.ManifestError),
    "not zlib": (broken({"header": "aGFsbG8="}, ("file",)), errors.ManifestError),
    "bomb": (broken({"header": pack(b" " * 50_000_000)}, ("file",)), errors.ManifestError),
    "tensor list": (broken({"tensors": []}), errors.ManifestError),
    "codec number": (broken({"codec": 1}, TENSOR), errors.ManifestError),
    "shape text": (broken({"shape": "2"}, TENSOR), errors.ManifestError),
    "part odd": (broken({"parts": {"code": 63}}, TENSOR), errors.ManifestError),
    "part negative": (broken({"parts": {"code": -64}}, TENSOR), errors.ManifestError),
    "no parts": (broken({"parts": {}}, TENSOR), errors.ManifestError),
    "config nested": (broken({"config": {"a": []}}, TENSOR), errors.ManifestError),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_refuses_record(name: str) -> None:
    metadata, error = BAD_RECORDS[name]
    with pytest.raises(errors.FormatError) as caught:
        read_record(metadata, "here")
    assert caught.type is error


def test_unknown_members_are_ignored() -> None:
    assert read_record(broken({"later": [1]}), "here") == RECORD


def test_inflation_is_bounded() -> None:
    bomb = base64.b64encode(zlib.compress(b"\0" * 10_000_000)).decode()
    with pytest.raises(errors.ManifestError, match="more than 100"):
        unpack(bomb, 100, "here")
    assert unpack(pack(b""), 0, "here") == b""


@pytest.mark.parametrize(
    ("tensor", "stored"),
    [
        ("a.b.weight", "a.b.code__weight"),
        ("weight", "code__weight"),
        ("a.", "a.code__"),
        ("", "code__"),
        ("ä.ß", "ä.code__ß"),
    ],
)
def test_part_names(tensor: str, stored: str) -> None:
    assert part_name(tensor, "code") == stored


MANIFEST = Manifest(
    "bitforbit 0.1.0",
    ["empty"],
    [
        FileEntry("config.json", "rewritten", 2, "a" * 64, 5, "b" * 32, b"{}"),
        FileEntry("m.safetensors", "shard", 2, "a" * 64, 5, "b" * 32),
        FileEntry("sub/t.json", "copied", 2, "a" * 64, 2, "b" * 32),
    ],
)


def test_manifest_round_trip() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes(), "here") == MANIFEST


def file_entry(**change: Any) -> dict[str, Any]:
    value: dict[str, Any] = {"path": "a", "kind": "copied", "size": 1, "sha256": "a" * 64,
                             "stored": {"size": 1, "xxh3_128": "b" * 32}}  # fmt: skip
    return value | change


def manifest(*files: Any, **change: Any) -> bytes:
    return json.dumps({"format_version": 1, "writer": "w", "directories": [], "files": list(files)} | change).encode()


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../x", "a/../x", "a//b", "./a", "a/", "a\0b", "..", "bitforbit.json", "\ud800", 1, None],
)
def test_refuses_paths(path: Any) -> None:
    with pytest.raises(errors.ManifestError):
        Manifest.from_bytes(manifest(file_entry(path=path)), "here")
    if isinstance(path, str):
        with pytest.raises(errors.ManifestError):
            Manifest.from_bytes(manifest(directories=[path]), "here")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, manifest(1), manifest(files={}), manifest(writer=None),
        manifest(file_entry(kind="moved")), manifest(file_entry(kind="rewritten")), manifest(file_entry(size="1")),
        manifest(file_entry(sha256="A" * 64)), manifest(file_entry(stored={})), manifest(file_entry(), file_entry()),
        manifest(file_entry(path="a"), file_entry(path="a/b")), manifest(file_entry(path="a/b"), directories=["a/b"]),
        manifest(file_entry(path="a"), directories=["a/b"]), manifest(directories=[1]),
        manifest(file_entry(kind="rewritten", original=pack(b" " * 1_000_000))),
    ],
)  # fmt: skip
def test_refuses_manifest(data: bytes) -> None:
    with pytest.raises(errors.ManifestError):
        Manifest.from_bytes(data, "here")


def test_originals_have_a_limit_together() -> None:
    """A megabyte of manifest must not inflate to a gigabyte."""
    entry = file_entry(kind="rewritten", size=MAX_HEADER_BYTES, original="not even read")
    files = [entry | {"path": f"{i}/config.json"} for i in range(5)]
    with pytest.raises(errors.ManifestError, match="together"):
        Manifest.from_bytes(manifest(*files), "here")
    entries = [FileEntry(str(i), "rewritten", MAX_HEADER_BYTES, "a" * 64, 5, "b" * 32, b"") for i in range(5)]
    with pytest.raises(errors.ManifestError, match="together"):
        Manifest("w", [], entries).to_bytes()


def test_refuses_newer_manifest() -> None:
    with pytest.raises(errors.UnsupportedVersionError):
        Manifest.from_bytes(manifest(format_version=2), "here")
