"""Operators on the tile layout: BF16 matrices in a GPU's memory (:mod:`bitforbit.cuda.tiles.layout`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from bitforbit.cuda.queue import Queue
from bitforbit.cuda.tiles import decode as kernels
from bitforbit.cuda.tiles.layout import ALIGNMENT, PARTS, TileLayout
from bitforbit.errors import CorruptTensorError, UsageError
from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu import fused, order, runtime
from bitforbit.ops.gpu.queues import addresses
from bitforbit.ops.gpu.weights import Geometry, checked_parts
from bitforbit.ops.schema import LIBRARY


def register() -> None:
    """Register the kernels; once per process."""
    for key in ("CPU", "CUDA"):
        LIBRARY.impl("tiles_decode", decode, key)
        LIBRARY.impl("tiles_embedding", embedding, key)
        LIBRARY.impl("tiles_linear", linear, key)
        LIBRARY.impl("tiles_linears", separate_linears, key)


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
    bias: torch.Tensor | None, rows: int, cols: int, mode: str, group: Sequence[int] = (),
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T + bias``, ``[..., rows]``.

    With torch's own bits, but for mode ``"fused"`` and up to 64 tokens: those have the order of sums that belongs to
    ``group``, the same bits in any company of tokens and matrices. Raises UsageError, CorruptTensorError.
    """
    parts = (tiles, escapes, offsets, header)
    if mode == "fused" and x.numel() <= fused.MAX_TOKENS * cols:
        return fused.linears(x, (fused.Matrix(parts, rows, bias),), cols, tuple(group))[0]
    return _exact(x, parts, rows, cols, bias, mode)


def linears(
    x: torch.Tensor, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], rows: Sequence[int],
    cols: int, mode: str, group: Sequence[int] = (),
) -> list[torch.Tensor]:  # fmt: skip
    """The products of one x with several matrices of four parts each: in mode ``"fused"`` one launch, up to 64 tokens.

    Each has the bits that :func:`linear` gives for it, with ``group``, which by default is these matrices. The results
    may be views of one memory. Raises UsageError, CorruptTensorError.
    """
    if not len(parts) == 4 * len(rows) == 4 * len(biases) > 0:
        raise UsageError(
            f"expected four parts, a number of rows and a bias or None for each of at least one matrix, got "
            f"{len(parts)}, {len(rows)} and {len(biases)}"
        )
    quadruples: list[Parts] = [(*parts[i : i + 4],) for i in range(0, len(parts), 4)]
    matrices = tuple(fused.Matrix(*each) for each in zip(quadruples, rows, biases, strict=True))
    group = tuple(group) or tuple(rows)
    if mode == "fused" and x.numel() <= fused.MAX_TOKENS * cols:
        return fused.linears(x, matrices, cols, group)
    return [_exact(x, m.parts, m.rows, cols, m.bias, mode) for m in matrices]


def _exact(x: torch.Tensor, parts: Parts, rows: int, cols: int, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
    proven = order.linear(x, parts, rows, cols, bias) if mode == "exact" else None
    return runtime.linear(geometry(rows, cols), x, parts, bias, mode) if proven is None else proven


def separate_linears(
    x: torch.Tensor, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], rows: Sequence[int],
    cols: int, mode: str, group: Sequence[int] = (),
) -> list[torch.Tensor]:  # fmt: skip
    """As :func:`linears`, each in memory of its own, as torch's dispatcher expects of an operator."""
    products = linears(x, parts, biases, rows, cols, mode, group)
    storages = {product.untyped_storage().data_ptr() for product in products}
    return products if len(storages) == len(products) else [product.clone() for product in products]
