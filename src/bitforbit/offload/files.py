"""Where the tensors of safetensors files lie."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bitforbit.format.header import read_header
from bitforbit.offload.image import FileRange


def file_ranges(paths: Iterable[str | os.PathLike[str]]) -> dict[str, FileRange]:
    """The bytes of every tensor of these files, by the names that they have there.

    Raises what reading the headers raises: FormatErrors, OSError.
    """
    found: dict[str, FileRange] = {}
    for path in map(Path, paths):
        header = read_header(path)
        for entry in header.tensors:
            found[entry.name] = FileRange(path, header.data_start + entry.begin, entry.nbytes)
    return found
