"""Operators on DFloat11 units in a GPU's memory (:mod:`bitforbit.cuda.df11`).

A linear decodes its own slice of a unit: the kernels start at the blocks that hold it. So every weight is decoded once
but for the two blocks at a slice's ends, and the memory of decoded weights is that of matrices, not of whole units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bitforbit.cuda import df11 as kernels
from bitforbit.cuda.df11 import PARTS, Df11Geometry
from bitforbit.cuda.queue import Queue
from bitforbit.errors import CorruptTensorError
from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu import runtime
from bitforbit.ops.gpu.queues import addresses
from bitforbit.ops.gpu.weights import Geometry, checked_parts
from bitforbit.ops.schema import LIBRARY


def register() -> None:
    """Register the kernels; once per process."""
    for key in ("CPU", "CUDA"):
        LIBRARY.impl("df11_decode", decode, key)
        LIBRARY.impl("df11_embedding", embedding, key)
        LIBRARY.impl("df11_linear", linear, key)


@dataclass(frozen=True)
class Df11Slice(Geometry):
    """A matrix ``[rows, cols]`` that begins at element ``first`` of a unit."""

    elements: int
    first: int

    def checked(self, parts: Parts) -> Parts:
        """See Geometry."""
        parts = checked_parts(PARTS, parts, 16)
        unit(parts, self.elements)
        return parts

    def decode(self, queue: Queue, parts: Parts, begin: int, end: int, out: int, workspace: int, status: int) -> None:
        """See Geometry."""
        first, last = self.first + begin * self.cols, self.first + end * self.cols
        kernels.decode(queue, addresses(parts), unit(parts, self.elements), first, last, out, status)

    def look_up(self, queue: Queue, parts: Parts, ids: torch.Tensor, out: int, workspace: int, status: int) -> None:
        """See Geometry."""
        kernels.rows(
            queue, addresses(parts), unit(parts, self.elements), self.first, self.cols, self.rows,
            ids.data_ptr(), ids.element_size(), ids.numel(), out, status,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def geometry(elements: int, begin: int, rows: int, cols: int) -> Df11Slice:
    """The geometry of a matrix within a unit. Raises CorruptTensorError if it is not within it."""
    if not (rows >= 1 and cols >= 1 and 0 <= begin <= begin + rows * cols <= elements):
        raise CorruptTensorError(
            f"expected a matrix within the {elements} elements of its unit, got {rows} x {cols} from {begin}"
        )
    return Df11Slice(rows, cols, elements, begin)


_units: dict[int, tuple[StorageWeakRef, int, Df11Geometry]] = {}


def unit(parts: Parts, elements: int) -> Df11Geometry:
    """The geometry of a unit, read from its part ``index`` at first sight, which waits for the device."""
    index = parts[3]
    found = _units.get(index.data_ptr())
    if found is not None and not found[0].expired():
        _, version, known = found
        if version == _version(index) and known.elements == elements:
            return known
    read = kernels.geometry_of(index.cpu().numpy(), elements, parts[1].numel())
    remember(index, read)
    return read


def remember(index: torch.Tensor, unit: Df11Geometry) -> None:
    """Note the geometry of the unit whose part ``index`` this is."""
    for address in [address for address, (storage, _, _) in list(_units.items()) if storage.expired()]:
        _units.pop(address, None)
    _units[index.data_ptr()] = StorageWeakRef(index.untyped_storage()), _version(index), unit


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def decode(
    tables: torch.Tensor, stream: torch.Tensor, sign_mantissa: torch.Tensor, index: torch.Tensor,
    elements: int, begin: int, end: int,
) -> torch.Tensor:  # fmt: skip
    """Elements [begin, end) of a unit, BF16 ``[end - begin]``. Raises UsageError, CorruptTensorError."""
    parts = (tables, stream, sign_mantissa, index)
    return runtime.decode(geometry(elements, 0, elements, 1), parts, begin, end).view(-1)


def embedding(
    ids: torch.Tensor, tables: torch.Tensor, stream: torch.Tensor, sign_mantissa: torch.Tensor, index: torch.Tensor,
    elements: int, begin: int, rows: int, cols: int,
) -> torch.Tensor:  # fmt: skip
    """Rows by number, BF16 ``[*ids.shape, cols]``. See :func:`bitforbit.ops.gpu.runtime.embedding`."""
    return runtime.embedding(geometry(elements, begin, rows, cols), ids, (tables, stream, sign_mantissa, index))


def linear(
    x: torch.Tensor, tables: torch.Tensor, stream: torch.Tensor, sign_mantissa: torch.Tensor, index: torch.Tensor,
    bias: torch.Tensor | None, elements: int, begin: int, rows: int, cols: int, mode: str,
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T + bias``, ``[..., rows]``, with torch's own bits. Raises UsageError, CorruptTensorError."""
    parts = (tables, stream, sign_mantissa, index)
    return runtime.linear(geometry(elements, begin, rows, cols), x, parts, bias, mode)
