"""Arrays in memory: ``encode`` an array, ``decode`` all of it or some of its rows, store it as a byte string.

Everything is exact: the bits of every element come back, NaN payloads and signed zeros included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np

from bitforbit import dtypes, tensors
from bitforbit.codecs import registry
from bitforbit.codecs.base import Bytes, EncodedTensor
from bitforbit.cpu import default_threads
from bitforbit.cpu import planes as kernels
from bitforbit.errors import TensorSizeError, UnknownDtypeError, UsageError
from bitforbit.format.serialized import SerializedArray

RAW = "raw"
"""Codec of arrays that are kept as they are: integers, and floats that coding would not make smaller."""

_RAW_PART = "data"
_CODEC = "planes"
_LIBRARIES = ("numpy", "torch")

Rows = slice | tuple[SupportsIndex, SupportsIndex]


class Encoded:
    """One array in compressed form; immutable, and safe to use from several threads at once. Made by :func:`encode`."""

    __slots__ = ("_library", "_tensor")

    def __init__(self, tensor: EncodedTensor, library: str) -> None:
        """For :func:`encode` and :meth:`from_bytes`: tensor must be valid."""
        self._tensor = tensor
        self._library = library

    @property
    def dtype(self) -> str:
        """Safetensors name of the element type, such as ``"BF16"``."""
        return self._tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._tensor.shape

    @property
    def codec(self) -> str:
        """``"planes"``, or ``"raw"`` where the elements are kept as they are."""
        return self._tensor.codec

    @property
    def library(self) -> str:
        """``"numpy"`` or ``"torch"``: what was encoded, and what :meth:`decode` makes."""
        return self._library

    @property
    def nbytes(self) -> int:
        """Bytes in compressed form."""
        return self._tensor.nbytes

    @property
    def original_nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self._itemsize

    @property
    def bits_per_weight(self) -> float:
        """Bits per element in compressed form; 0 for an empty array."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    @property
    def _itemsize(self) -> int:
        return dtypes.bits(self.dtype) // 8

    def __repr__(self) -> str:
        return (
            f"Encoded({self.dtype}, shape={self.shape}, codec={self.codec!r}, {self.nbytes} of {self.original_nbytes} "
            f"bytes, {self.bits_per_weight:.2f} bits/weight)"
        )

    def decode(self, out: Any = None, rows: Rows | None = None, threads: int | None = None) -> Any:
        """Decode the whole array, or the rows [begin, end) along its first axis.

        rows is ``(begin, end)`` or a slice without a step; only the blocks that hold these rows are read. out is a
        contiguous numpy array or CPU torch tensor of this dtype and of the shape of the result, which is then
        returned; without it a new array of the library that was encoded. threads defaults to ``BITFORBIT_THREADS``,
        else all CPUs.

        Raises UsageError for unsuitable rows, out or threads, MissingDependencyError if torch is needed and was not
        imported, and CorruptTensorError if the compressed data, read from somewhere else, contradict themselves.
        """
        threads = _checked_threads(threads)
        begin, end = self._checked_rows(rows)
        shape = self.shape if rows is None else (end - begin, *self.shape[1:])
        if out is None:
            out = tensors.empty(self._library, self.dtype, shape)
        buffer = tensors.writable_bytes(out, self.dtype, shape)
        row_elements = math.prod(self.shape[1:])
        self._decode_elements(buffer, begin * row_elements, end * row_elements, threads)
        return out

    def _checked_rows(self, rows: Rows | None) -> tuple[int, int]:
        if rows is None:
            return 0, self.shape[0] if self.shape else 1
        if not self.shape:
            raise UsageError("expected no rows for an array without dimensions")
        length = self.shape[0]
        if isinstance(rows, slice):
            begin, end, step = rows.indices(length)
            if step != 1:
                raise UsageError(f"expected rows without a step, got {rows}; decode first, then slice")
            return begin, max(begin, end)
        try:
            begin, end = (n.__index__() for n in rows)
        except (TypeError, ValueError, AttributeError):
            raise UsageError(f"expected rows to be (begin, end) or a slice, got {rows!r}") from None
        if not 0 <= begin <= end <= length:
            raise UsageError(f"expected rows within 0 to {length}, got {begin} to {end}")
        return begin, end

    def _decode_elements(self, out: Bytes, begin: int, end: int, threads: int) -> None:
        """Decode the elements [begin, end) of the flat array."""
        size = self._itemsize
        if begin == end:
            return
        if self.codec == RAW:
            np.copyto(out, self._tensor.parts[_RAW_PART][begin * size : end * size])
            return
        codec = registry.get(self.codec, self._tensor.codec_version)
        cols = int(self._tensor.config["cols"])
        first, last = begin // cols, -(-end // cols)  # rows of the matrix view that hold these elements
        if (first * cols, last * cols) == (begin, end):
            codec.decode(self._tensor, out, (first, last), threads)
            return
        scratch = kernels.empty((last - first) * cols * size)
        codec.decode(self._tensor, scratch, (first, last), threads)
        np.copyto(out, scratch[(begin - first * cols) * size : (end - first * cols) * size])

    def to_bytes(self) -> bytes:
        """A byte string that describes and checks itself (docs/format.md, section 6)."""
        t = self._tensor
        return SerializedArray(
            t.codec, t.codec_version, t.dtype, t.shape, t.config, t.parts, self._library
        ).to_bytes()  # fmt: skip

    @classmethod
    def from_bytes(cls, data: Any) -> Encoded:
        """Inverse of :meth:`to_bytes`. data is bytes, or any contiguous buffer: it is used in place, not copied.

        Raises a FormatError (such as ChecksumError) for anything but the result of :meth:`to_bytes`, UsageError if
        data is no contiguous buffer.
        """
        try:
            view = memoryview(data).cast("B")
        except (TypeError, ValueError) as e:
            raise UsageError(f"expected bytes or a contiguous buffer, got {type(data).__name__} ({e})") from None
        stored = SerializedArray.from_bytes(np.frombuffer(view, np.uint8))
        try:
            dtypes.to_numpy(stored.dtype)
        except UsageError as e:
            raise UnknownDtypeError(f"serialized array: {e}") from None
        parts: Mapping[str, Bytes] = stored.parts
        version = stored.codec_version
        tensor = EncodedTensor(stored.codec, version, stored.dtype, stored.shape, stored.config, parts)
        _check(tensor)
        return cls(tensor, stored.library if stored.library in _LIBRARIES else "numpy")

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return Encoded.from_bytes, (self.to_bytes(),)


def encode(array: Any, threads: int | None = None) -> Encoded:
    """Compress a numpy array or a CPU torch tensor of any shape, losslessly.

    Floats of dtype bfloat16, float16, float32, float8_e4m3fn and float8_e5m2 are coded where that makes them smaller;
    every other dtype that safetensors files can hold is kept as it is. The array is not referenced afterwards.
    threads defaults to ``BITFORBIT_THREADS``, else all CPUs.

    Raises UsageError for other objects and for tensors that are not in CPU memory, UnsupportedDtypeError.
    """
    threads = _checked_threads(threads)
    data, dtype, shape = tensors.to_bytes(array)
    library = tensors.library_of(array)
    codec = registry.get(_CODEC, 1)
    coded = codec.encode(data, dtype, shape, threads) if data.nbytes else None
    if coded is None:
        coded = EncodedTensor(RAW, 1, dtype, shape, {}, {_RAW_PART: data.copy()})
    return Encoded(coded, library)


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return default_threads()
    if not isinstance(threads, int) or threads < 1:
        raise UsageError(f"expected threads to be a positive number, got {threads!r}")
    return threads


def _check(tensor: EncodedTensor) -> None:
    """Check that parts and config fit the shape, so that decoding allocates what the parts warrant and no more.

    Raises UnsupportedVersionError, TensorSizeError or CorruptTensorError.
    """
    sizes = {name: part.nbytes for name, part in tensor.parts.items()}
    if tensor.codec == RAW and tensor.codec_version == 1:
        nbytes = math.prod(tensor.shape) * dtypes.bits(tensor.dtype) // 8
        if sizes != {_RAW_PART: nbytes}:
            raise TensorSizeError(f"serialized array: expected {nbytes} bytes of raw data, got parts {sizes}")
        return
    registry.get(tensor.codec, tensor.codec_version).check(tensor.dtype, tensor.shape, tensor.config, sizes)
