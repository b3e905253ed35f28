"""Safetensors files as the safetensors library writes them, read tensor by tensor and written as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.errors import DuplicateKeyError
from bitforbit.format.header import TensorEntry, read_header

# The library stores tensors by dtype, in this order, then by name (safetensors 0.8, `tensor.rs`).
_DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file on disk."""

    path: Path
    data_start: int
    entry: TensorEntry

    def map(self) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, read-only, read from the file when they are touched."""
        if self.entry.nbytes == 0:
            return np.empty(0, np.uint8)
        offset = self.data_start + self.entry.begin
        return np.memmap(self.path, np.uint8, "r", offset, (self.entry.nbytes,))


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the safetensors files in a directory, file by file, each in the order of its bytes.

    Raises DuplicateKeyError for a tensor that is in two files, and what ``read_header`` raises.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        header = read_header(path)
        for entry in header.by_offset():
            if entry.name in tensors:
                raise DuplicateKeyError(
                    f"expected every tensor once, got {entry.name!r} in {tensors[entry.name].path} and {path}; "
                    "remove the file that does not belong here"
                )
            tensors[entry.name] = StoredTensor(path, header.data_start, entry)
    return tensors


def library_layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[TensorEntry]]:
    """Header bytes, length included, and entries in file order, as the library would write (name, dtype, shape)."""
    members: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    entries = []
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (_DTYPE_ORDER.index(t[1]), t[0].encode())):
        num_bits = dtypes.bits(dtype)
        for dim in shape:
            num_bits *= dim
        entries.append(TensorEntry(name, dtype, shape, position, position + num_bits // 8))
        members[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bits // 8]}
        position += num_bits // 8
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, entries
