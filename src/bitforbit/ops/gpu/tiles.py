"""Operators on the tile layout: BF16 matrices in a GPU's memory (:mod:`bitforbit.cuda.tiles.layout`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from bitforbit.cuda.queue import Queue
from bitforbit.cuda.tiles import decode as kernels
from bitforbit.cuda.tiles.layout import ALIGNMENT, PARTS, TileLayout
from bitforbit.errors import CorruptTensorError
from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu import runtime
from bitforbit.ops.gpu.queues import addresses
from bitforbit.ops.gpu.weights import Geometry, checked_parts
from bitforbit.ops.schema import LIBRARY


def register() -> None:
    """Register the kernels; once per process."""
    for key in ("CPU", "CUDA"):
        LIBRARY.impl("tiles_decode", decode, key)
        LIBRARY.impl("tiles_embedding", embedding, key)
        LIBRARY.impl("tiles_linear", linear, key)


@dataclass(frozen=True)
class Tiles(Geometry):
    """A matrix in tiles."""

    @cached_property
    def layout(self) -> TileLayout:
        """Sizes of the parts."""
        return TileLayout(self.rows, self.cols)

    def checked(self, parts: Parts) -> Parts:
        """See Geometry."""
        return checked_parts(PARTS, parts, ALIGNMENT)

    def decode(self, queue: Queue, parts: Parts, begin: int, end: int, out: int, workspace: int, status: int) -> None:
        """See Geometry."""
        kernels.decode(queue, addresses(parts), self.layout, begin, end, out)

    def look_up(self, queue: Queue, parts: Parts, ids: torch.Tensor, out: int, workspace: int, status: int) -> None:
        """See Geometry."""
        kernels.rows(queue, addresses(parts), self.layout, ids.data_ptr(), ids.element_size(), ids.numel(), out, status)


@lru_cache(maxsize=4096)
def geometry(rows: int, cols: int) -> Tiles:
    """The geometry of a matrix. Raises CorruptTensorError if there is none."""
    if rows < 1 or cols < 1:
        raise CorruptTensorError(f"expected at least one row and one column, got {rows} and {cols}")
    return Tiles(rows, cols)


def decode(
    tiles: torch.Tensor, escapes: torch.Tensor, offsets: torch.Tensor, header: torch.Tensor,
    rows: int, cols: int, begin: int, end: int,
) -> torch.Tensor:  # fmt: skip
    """Rows [begin, end) of a matrix, BF16 ``[end - begin, cols]``. Raises UsageError, CorruptTensorError."""
    return runtime.decode(geometry(rows, cols), (tiles, escapes, offsets, header), begin, end)


def embedding(
    ids: torch.Tensor, tiles: torch.Tensor, escapes: torch.Tensor, offsets: torch.Tensor, header: torch.Tensor,
    rows: int, cols: int,
) -> torch.Tensor:  # fmt: skip
    """Rows by number, BF16 ``[*ids.shape, cols]``. See :func:`bitforbit.ops.gpu.runtime.embedding`."""
    return runtime.embedding(geometry(rows, cols), ids, (tiles, escapes, offsets, header))


def linear(
    x: torch.Tensor, tiles: torch.Tensor, escapes: torch.Tensor, offsets: torch.Tensor, header: torch.Tensor,
    bias: torch.Tensor | None, rows: int, cols: int, mode: str,
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T + bias``, ``[..., rows]``, with torch's own bits. Raises UsageError, CorruptTensorError."""
    return runtime.linear(geometry(rows, cols), x, (tiles, escapes, offsets, header), bias, mode)
