"""Fuzz the parser of safetensors headers: it refuses with FormatError or gives a header that covers its file.

Input: a mode byte and a u16, then a whole file (even modes), or a header's JSON for a file with that u16 of data.
"""

from __future__ import annotations

import io
import sys

import atheris

with atheris.instrument_imports(include=["bitforbit"]):
    from bitforbit.errors import FormatError
    from bitforbit.format.header import Header, build_header, parse_header, read_header
    from bitforbit.format.spec import LENGTH_BYTES


def check(header: Header) -> None:
    """What every accepted header guarantees."""
    position = 0
    for entry in header.by_offset():
        assert entry.begin == position <= entry.end, f"{entry} does not begin at {position}"
        position = entry.end
    assert header.data_start + position == header.file_size, "the tensors do not cover the file"
    written = build_header(header.tensors, header.metadata)
    again = read_header(io.BytesIO(written + bytes(position)))
    assert again.tensors == header.tensors, "tensors changed by writing and reading"
    assert again.metadata == header.metadata, "metadata changed by writing and reading"


def test_one_input(data: bytes) -> None:
    """Entry point of the fuzzer."""
    mode, size, body = data[:1], int.from_bytes(data[1:3], "little"), data[3:]
    try:
        if mode and mode[0] % 2:
            header = parse_header(body, LENGTH_BYTES + len(body) + size, "fuzz")
        else:
            header = read_header(io.BytesIO(body))
    except FormatError:
        return
    if header.file_size < 1 << 20:
        check(header)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
