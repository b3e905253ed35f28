"""Operators on the tile layout: matrices in a GPU's memory (:mod:`bitforbit.cuda.tiles.layout`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from bitforbit.cuda.queue import Queue
from bitforbit.cuda.tiles import decode as kernels
from bitforbit.cuda.tiles import kinds
from bitforbit.cuda.tiles.layout import ALIGNMENT, PARTS, TileLayout
from bitforbit.errors import CorruptTensorError, UsageError
from bitforbit.ops.checks import Parts, multiplies
from bitforbit.ops.gpu import fused, order, runtime
from bitforbit.ops.gpu.queues import addresses
from bitforbit.ops.gpu.weights import Geometry, checked_parts
from bitforbit.ops.schema import LIBRARY, TILES_DTYPES


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

    kind: str = "BF16"

    @property
    def dtype(self) -> torch.dtype:
        """See Geometry."""
        return TILES_DTYPES[self.kind]

    @cached_property
    def layout(self) -> TileLayout:
        """Sizes of the parts."""
        return TileLayout(self.rows, self.cols, kinds.of(self.kind))

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
def geometry(rows: int, cols: int, kind: str = "BF16") -> Tiles:
    """The geometry of a matrix. Raises CorruptTensorError if there is none, UnsupportedDtypeError."""
    kinds.of(kind)
    if rows < 1 or cols < 1:
        raise CorruptTensorError(f"expected at least one row and one column, got {rows} and {cols}")
    return Tiles(rows, cols, kind)


def decode(
    tiles: torch.Tensor, escapes: torch.Tensor, offsets: torch.Tensor, header: torch.Tensor,
    rows: int, cols: int, begin: int, end: int, kind: str = "BF16",
) -> torch.Tensor:  # fmt: skip
    """Rows [begin, end) of a matrix, ``[end - begin, cols]``. Raises UsageError, CorruptTensorError."""
    return runtime.decode(geometry(rows, cols, kind), (tiles, escapes, offsets, header), begin, end)


def embedding(
    ids: torch.Tensor, tiles: torch.Tensor, escapes: torch.Tensor, offsets: torch.Tensor, header: torch.Tensor,
    rows: int, cols: int, kind: str = "BF16",
) -> torch.Tensor:  # fmt: skip
    """Rows by number, ``[*ids.shape, cols]``. See :func:`bitforbit.ops.gpu.runtime.embedding`."""
    return runtime.embedding(geometry(rows, cols, kind), ids, (tiles, escapes, offsets, header))


def linear(
    x: torch.Tensor, tiles: torch.Tensor, escapes: torch.Tensor, offsets: torch.Tensor, header: torch.Tensor,
    bias: torch.Tensor | None, rows: int, cols: int, mode: str, group: Sequence[int] = (), kind: str = "BF16",
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T + bias``, ``[..., rows]``.

    With torch's own bits, but for mode ``"fused"`` and up to 64 tokens: those have the order of sums that belongs to
    ``group``, the same bits in any company of tokens and matrices, and take a bias in BF16, FP16 or FP32. Weights of
    FP8 are multiplied as BF16 by x in BF16; other x are multiplied as in exact mode. Raises UsageError,
    CorruptTensorError.
    """
    matrix = fused.Matrix((tiles, escapes, offsets, header), rows, bias, kind)
    if _is_fused(x, cols, mode, kind):
        return fused.linears(x, (matrix,), cols, tuple(group))[0]
    return _exact(x, matrix, cols, mode)


def linears(
    x: torch.Tensor, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], rows: Sequence[int],
    cols: int, mode: str, group: Sequence[int] = (), kind: str = "BF16",
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
    matrices = tuple(fused.Matrix(*each, kind) for each in zip(quadruples, rows, biases, strict=True))
    group = tuple(group) or tuple(rows)
    if _is_fused(x, cols, mode, kind):
        return fused.linears(x, matrices, cols, group)
    return [_exact(x, matrix, cols, mode) for matrix in matrices]


def _is_fused(x: torch.Tensor, cols: int, mode: str, kind: str) -> bool:
    decoded = kind == "F8_E4M3" and x.dtype is not torch.bfloat16 and multiplies(x.dtype, TILES_DTYPES[kind])
    return mode == "fused" and x.numel() <= fused.MAX_TOKENS * cols and not decoded


def _exact(x: torch.Tensor, matrix: fused.Matrix, cols: int, mode: str) -> torch.Tensor:
    parts, rows, bias, kind = matrix
    if mode == "fused" and bias is not None:
        bias = bias.to(x.dtype)  # as fewer tokens take it
    proven = order.linear(x, parts, rows, cols, bias) if mode == "exact" and kind == "BF16" else None
    return runtime.linear(geometry(rows, cols, kind), x, parts, bias, mode) if proven is None else proven


def separate_linears(
    x: torch.Tensor, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], rows: Sequence[int],
    cols: int, mode: str, group: Sequence[int] = (), kind: str = "BF16",
) -> list[torch.Tensor]:  # fmt: skip
    """As :func:`linears`, each in memory of its own, as torch's dispatcher expects of an operator."""
    products = linears(x, parts, biases, rows, cols, mode, group, kind)
    storages = {product.untyped_storage().data_ptr() for product in products}
    return products if len(storages) == len(products) else [product.clone() for product in products]
