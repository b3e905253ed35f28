"""Weights in the layouts of GPUs: what the prefetcher and the operators want to know of each.

A geometry is everything but the data: hashable, the same for all weights of a kind and shape. Geometries enqueue the
decoding of their weights through functions of :mod:`bitforbit.cuda`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from bitforbit.cuda.queue import Queue
from bitforbit.errors import UsageError
from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu.queues import empty_bytes

ALIGNMENT = 256
"""Boundary, in bytes, of everything that kernels write; torch's memory on a GPU is on a wider one."""


@dataclass(frozen=True)
class Geometry(ABC):
    """A kind of weight and its sizes."""

    rows: int
    """Rows of the matrix."""
    cols: int
    """Columns of the matrix."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoded matrix."""
        return torch.bfloat16

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the decoded matrix."""
        return self.rows * self.cols * int(self.dtype.itemsize)

    @cached_property
    def workspace_bytes(self) -> int:
        """Memory that decoding needs beside the matrix."""
        return 0

    @cached_property
    def workspace_offset(self) -> int:
        """Where the workspace begins in the memory of a decoded weight: behind the matrix, on the next boundary."""
        return padded(self.matrix_bytes)

    @cached_property
    def memory_rows(self) -> int:
        """Rows of a matrix whose memory holds the decoded one and the workspace."""
        if not self.workspace_bytes:
            return self.rows
        row_bytes = self.cols * int(self.dtype.itemsize)
        return -(-(self.workspace_offset + self.workspace_bytes) // row_bytes)

    @cached_property
    def memory_bytes(self) -> int:
        """Memory for the decoded weight, workspace included."""
        return self.memory_rows * self.cols * int(self.dtype.itemsize)

    @abstractmethod
    def checked(self, parts: Parts) -> Parts:
        """The parts as kernels take them. Raises UsageError, CorruptTensorError if they cannot be such a weight's."""

    @abstractmethod
    def decode(self, queue: Queue, parts: Parts, begin: int, end: int, out: int, workspace: int, status: int) -> None:
        """Enqueue the decoding of rows [begin, end) to address ``out``."""

    @abstractmethod
    def look_up(self, queue: Queue, parts: Parts, ids: torch.Tensor, out: int, workspace: int, status: int) -> None:
        """Enqueue the decoding of rows by number, contiguous ids of any shape, to address ``out``."""


@dataclass(frozen=True)
class RowSlice(Geometry):
    """Rows from ``begin`` on of a larger weight."""

    whole: Geometry
    begin: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoded matrix."""
        return self.whole.dtype

    @cached_property
    def workspace_bytes(self) -> int:
        """See Geometry."""
        return self.whole.workspace_bytes

    def checked(self, parts: Parts) -> Parts:
        """See Geometry."""
        return self.whole.checked(parts)

    def decode(self, queue: Queue, parts: Parts, begin: int, end: int, out: int, workspace: int, status: int) -> None:
        """See Geometry."""
        self.whole.decode(queue, parts, self.begin + begin, self.begin + end, out, workspace, status)

    def look_up(self, queue: Queue, parts: Parts, ids: torch.Tensor, out: int, workspace: int, status: int) -> None:
        """See Geometry."""
        raise NotImplementedError("rows are looked up in the whole weight")


@dataclass(eq=False)
class Weight:
    """One weight."""

    geometry: Geometry
    parts: Parts
    key: tuple[Any, ...] = field(init=False)
    """Equal for equal memory and geometry; another weight may have it once this one is freed."""

    def __post_init__(self) -> None:
        self.key = (*(part.data_ptr() for part in self.parts), self.geometry)

    @property
    def nbytes(self) -> int:
        """Memory that it takes when decoded."""
        return self.geometry.memory_bytes

    @property
    def versions(self) -> tuple[int, ...] | None:
        """Counts of the changes in place of its parts; None if torch does not count them (inference tensors)."""
        try:
            a, b, c, d = self.parts
            return a._version, b._version, c._version, d._version
        except RuntimeError:
            return None

    def checked(self) -> Weight:
        """The weight with parts as kernels take them. Raises UsageError, CorruptTensorError."""
        parts = self.geometry.checked(self.parts)
        return self if parts is self.parts else Weight(self.geometry, parts)

    def matrix(self, empty: Callable[[tuple[int, int], torch.dtype], torch.Tensor]) -> torch.Tensor:
        """Memory for the decoded matrix ``[rows, cols]``, the workspace behind it; ``empty`` takes shape and dtype."""
        geometry = self.geometry
        memory = empty((geometry.memory_rows, geometry.cols), geometry.dtype)
        return memory if geometry.memory_rows == geometry.rows else memory[: geometry.rows]

    def decode(self, queue: Queue, matrix: torch.Tensor, status: int) -> None:
        """Enqueue the decoding into such a matrix."""
        geometry, out = self.geometry, matrix.data_ptr()
        geometry.decode(queue, self.parts, 0, geometry.rows, out, out + geometry.workspace_offset, status)


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to the boundary on which kernels write."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def checked_parts(names: Sequence[str], parts: Parts, alignment: int) -> Parts:
    """The parts on boundaries of ``alignment`` bytes: copies of those that are views into other memory.

    Raises UsageError unless they are contiguous bytes in one dimension on one device.
    """
    device = parts[0].device
    for name, part in zip(names, parts, strict=True):
        if part.dtype is not torch.uint8 or part.dim() != 1 or not part.is_contiguous() or part.device != device:
            raise UsageError(
                f"expected part {name} to be contiguous uint8 of one dimension on {device}, got {part.dtype} of shape "
                f"{tuple(part.shape)} on {part.device}"
            )
    if any(part.data_ptr() % alignment for part in parts):
        a, b, c, d = (aligned(part, alignment) for part in parts)
        return a, b, c, d
    return parts


def aligned(tensor: torch.Tensor, alignment: int = ALIGNMENT) -> torch.Tensor:
    """A contiguous tensor of the same values on a boundary."""
    tensor = tensor.detach().contiguous()
    if tensor.data_ptr() % alignment == 0:
        return tensor
    copy = empty_bytes(tensor.numel() * tensor.element_size(), tensor.device).view(tensor.dtype)
    return copy.view(tensor.shape).copy_(tensor)
