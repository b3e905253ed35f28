"""Fuzz the parsers of records and manifests: they refuse with FormatError, or what they read can be written again.

Input: a mode byte, then the JSON of a record (even modes; its checksum is made to fit) or of a manifest.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["bitforbit"]):
    from bitforbit.errors import FormatError
    from bitforbit.format import checksum
    from bitforbit.format.manifest import Manifest
    from bitforbit.format.record import read_record
    from bitforbit.format.spec import RECORD_CHECKSUM_KEY, RECORD_KEY


def check_record(text: str) -> None:
    """Read a record, write it, read it again."""
    digest = checksum.xxh3_64([text.encode("utf-8")])
    record = read_record({RECORD_KEY: text, RECORD_CHECKSUM_KEY: digest}, "fuzz")
    assert read_record(record.metadata(), "fuzz") == record, "record changed by writing and reading"


def check_manifest(data: bytes) -> None:
    """Read a manifest, write it, read it again."""
    manifest = Manifest.from_bytes(data, "fuzz")
    for path in [*manifest.directories, *(entry.path for entry in manifest.files)]:
        assert "\0" not in path, f"unsafe path {path!r}"
        assert not {"", ".", ".."} & set(path.split("/")), f"unsafe path {path!r}"
    written = manifest.to_bytes()
    assert Manifest.from_bytes(written, "fuzz").to_bytes() == written, "manifest changed by writing and reading"


def test_one_input(data: bytes) -> None:
    """Entry point of the fuzzer."""
    try:
        if data[:1] and data[0] % 2:
            check_manifest(data[1:])
        else:
            check_record(data[1:].decode("utf-8", "replace"))
    except FormatError:
        return


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
