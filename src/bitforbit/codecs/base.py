"""What a tensor codec is, and what it makes of a tensor.

A codec turns the bytes of one tensor into a few named parts, each a run of bytes that a container stores as it
likes, and back. Codecs know nothing of files; containers know nothing of codecs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
"""One-dimensional contiguous array of bytes."""

PART_ALIGNMENT = 64
"""Every part is a multiple of this many bytes long, so parts laid end to end stay aligned for SIMD loads."""


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor in coded form.

    dtype is the safetensors name and shape the shape of the original tensor. config holds the codec's own
    parameters, JSON-able. parts maps part names to bytes; each is a multiple of PART_ALIGNMENT bytes long.
    """

    codec: str
    codec_version: int
    dtype: str
    shape: tuple[int, ...]
    config: Mapping[str, int | str] = field(default_factory=dict)
    parts: Mapping[str, Bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.nbytes for part in self.parts.values())


Fetch = Callable[[str, int, Bytes], None]
"""Fills an array with the bytes of the named part from that offset on; the codec asks for no others."""


class RowReader(Protocol):
    """Decodes ranges of rows of one tensor's matrix view, fetching only the bytes that they need."""

    cols: int
    step: int
    """Rows that are coded together: ranges that begin and end at multiples of it fetch nothing twice."""

    def read(self, begin: int, end: int, out: Bytes, threads: int) -> None:
        """Decode the rows [begin, end) into ``out``. Raises CorruptTensorError, and what fetching raises."""
        ...


class Codec(Protocol):
    """A lossless tensor codec. Every method may be called from several threads at once."""

    name: str
    version: int
    part_names: tuple[str, ...]

    def encode(self, data: Bytes, dtype: str, shape: tuple[int, ...], threads: int) -> EncodedTensor | None:
        """Encode the little-endian, row-major bytes of a tensor; None where coding does not pay.

        Deterministic: the same bytes give the same parts on every machine, thread count and instruction set.
        """
        ...

    def check(
        self, dtype: str, shape: tuple[int, ...], config: Mapping[str, int | str], sizes: Mapping[str, int]
    ) -> None:
        """Check that parts of these sizes in bytes can hold such a tensor, before memory for it is allocated.

        Raises CorruptTensorError.
        """
        ...

    def decode(self, tensor: EncodedTensor, out: Bytes, rows: tuple[int, int] | None, threads: int) -> None:
        """Decode the whole tensor, or the rows [begin, end) of its matrix view, into ``out``.

        Raises CorruptTensorError if the parts contradict each other or the config; never reads or writes outside
        the given buffers, whatever the parts hold.
        """
        ...

    def row_reader(
        self,
        dtype: str,
        shape: tuple[int, ...],
        config: Mapping[str, int | str],
        sizes: Mapping[str, int],
        fetch: Fetch,
        end: int,
    ) -> RowReader:
        """A reader of rows of the matrix view, for parts of these sizes in bytes.

        It reads up to the row that holds the element before ``end``, an index into the flat tensor. Raises UsageError
        if there are fewer elements, CorruptTensorError as ``check`` does, and what fetching raises.
        """
        ...
