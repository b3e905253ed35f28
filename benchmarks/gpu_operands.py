"""What the benchmarks of fused products multiply: weights as they are and in tiles, in several copies, and a gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu_common import Meter, same_bits
from benchmarks.gpu_decode import nbytes, weights
from benchmarks.gpu_shapes import Shape
from bitforbit.cuda.fused import linear as fused
from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.fused.plan import MAX_TOKENS, Variant
from bitforbit.cuda.tiles import kinds
from bitforbit.cuda.tiles.layout import TileLayout
from bitforbit.ops import gpu
from bitforbit.ops.gpu.queues import addresses
from bitforbit.ops.schema import TILES_DTYPES

Call = Callable[[], object]
Parts = tuple[torch.Tensor, ...]

LEAST_COPIES = 3
"""Fewer would let a weight meet itself when it is decoded ahead."""
ERROR_MARGIN = 1.01
"""Errors against FP64 are nearly all the last rounding to BF16, which both sides share: they are this close."""
FP64_ROWS = 8192
"""Of a matrix, in FP64 at a time."""


@dataclass
class Copy:
    """The weights once more, elsewhere in memory."""

    joined: torch.Tensor
    """[all rows, cols]."""
    plain: tuple[torch.Tensor, ...]
    """The matrices, views of ``joined``."""
    parts: tuple[Parts, ...]
    """Of each matrix, in tiles."""


class Operands:
    """Weights of a shape, as often as it takes for none of them to be in the L2 cache at its turn, and x."""

    def __init__(self, meter: Meter, shape: Shape, seed: int = 0, kind: str = "BF16") -> None:
        self.shape = shape
        self.device = meter.device
        self.kind = kinds.of(kind)
        """Of the weights."""
        self.dtype = TILES_DTYPES[self.kind.outputs]
        """Of x and of the products; torch casts weights in FP8 to it before each product."""
        joined = weights(sum(shape.rows), shape.cols, meter.device, seed).to(TILES_DTYPES[kind])
        parts = []
        for matrix in joined.split(shape.rows):
            packed = gpu.pack_tiles(matrix)
            assert packed is not None, "Gaussian weights get smaller"
            parts.append(tuple(packed.values()))
        self.nbytes = sum(map(nbytes, parts))
        """In tiles."""
        self.copies = [Copy(joined, joined.split(shape.rows), tuple(parts))]
        for _ in range(max(LEAST_COPIES, meter.rotations(self.nbytes)) - 1):
            other = joined.clone()
            clones = tuple(tuple(part.clone() for part in matrix) for matrix in parts)
            self.copies.append(Copy(other, other.split(shape.rows), clones))
        self.x = (weights(2 * MAX_TOKENS, shape.cols, meter.device, 99) * 50).to(self.dtype)  # as after a layer norm
        queue, layouts = gpu.queue_for(self.device), [TileLayout(rows, shape.cols, self.kind) for rows in shape.rows]
        self._groups = [
            fused.prepare(queue, [(addresses(p), layout, 0) for p, layout in zip(copy.parts, layouts, strict=True)])
            for copy in self.copies
        ]
        self.order = self._groups[0].order
        """Of summation, as the device's heuristic has it."""
        self._sums: dict[tuple[int, Order], list[torch.Tensor]] = {}
        self._workspaces: list[torch.Tensor] = []
        """The last one is in use; graphs may hold the addresses of the others."""

    def products(self, tokens: int, order: Order | None = None, variant: Variant | None = None) -> list[Call]:
        """A fused product with each copy."""
        return [partial(self._product, group, tokens, order or self.order, variant) for group in self._groups]

    def fused(self, tokens: int, order: Order | None = None, variant: Variant | None = None) -> torch.Tensor:
        """The product with the first copy: as many outputs in a row as the kernel writes."""
        return self._product(self._groups[0], tokens, order or self.order, variant)

    def torch_products(self, tokens: int) -> list[Call]:
        """Torch's products with the matrices one after the other, for each copy."""
        x = self.x[:tokens]
        return [partial(_each, x, copy.plain) for copy in self.copies]

    def torch_joined(self, tokens: int) -> list[Call]:
        """Torch's products with all matrices as one, for each copy."""
        return [partial(_product, self.x[:tokens], copy.joined) for copy in self.copies]

    def operator_products(self, tokens: int, mode: str) -> list[Call]:
        """The operator's products with the matrices one after the other, for each copy."""
        return [partial(self._operator, tokens, mode, copy) for copy in self.copies]

    def check(self, tokens: tuple[int, ...]) -> dict[str, float]:
        """The gate. Fused products are right, whatever the number of tokens; returns the errors of check_product.

        Raises AssertionError.
        """
        most = max(count for count in tokens if count <= MAX_TOKENS)
        errors, whole = self.check_product(most), self.outputs(self.fused(most), most)
        for count in sorted({count for count in tokens if count < most}):
            for number, got in enumerate(self.outputs(self.fused(count), count)):
                same_bits(got, whole[number][:count], f"{self.shape.name}, matrix {number}: {count} and {most} tokens")
        return errors

    def check_product(
        self, tokens: int, order: Order | None = None, variant: Variant | None = None
    ) -> dict[str, float]:
        """One fused product is as close to FP64 as torch's, and has the bits of the same sums from BF16 weights.

        The latter for the instruction that the kernel for BF16 weights has. Returns both root mean squares of the
        differences from FP64. Raises AssertionError.
        """
        order = order or self.order
        got = self.outputs(self.fused(tokens, order, variant), tokens)
        for number, expected in enumerate(self._expected(tokens, order)):
            same_bits(got[number], expected, f"{self.shape.name}, matrix {number}: fused ({variant}) and plain")
        theirs = _each(self.x[:tokens], self.copies[0].plain)
        errors = {"fused": self._error(torch.cat(got, 1)), "torch": self._error(torch.cat(theirs, 1))}
        if not errors["fused"] <= ERROR_MARGIN * errors["torch"]:
            raise AssertionError(f"{self.shape.name}: expected an error of at most torch's, got {errors}")
        return errors

    def outputs(self, flat: torch.Tensor, tokens: int) -> list[torch.Tensor]:
        """What the kernel writes, as a matrix [tokens, rows] of each product."""
        parts = flat.split([tokens * rows for rows in self.shape.rows])
        return [part.view(tokens, rows) for part, rows in zip(parts, self.shape.rows, strict=True)]

    def _expected(self, tokens: int, order: Order) -> list[torch.Tensor]:
        """Sums from BF16 weights, a matrix [tokens, rows] of each product; slow, so they are kept.

        None for another instruction than mma's: how it sums is the hardware's business.
        """
        if not order.instruction.startswith("mma."):
            return []
        if (tokens, order) not in self._sums:
            queue = gpu.queue_for(self.device)
            sums = [torch.empty(tokens, rows, dtype=self.dtype, device=self.device) for rows in self.shape.rows]
            for matrix, out in zip(self.copies[0].plain, sums, strict=True):
                cast = matrix.to(self.dtype)
                fused.plain(
                    queue, cast.data_ptr(), len(cast), order, 0, self.x.data_ptr(), tokens, out.data_ptr(),
                    self.kind.outputs,
                )  # fmt: skip
            self._sums[tokens, order] = sums
        return self._sums[tokens, order]

    def _product(self, group: fused.Group, tokens: int, order: Order, variant: Variant | None) -> torch.Tensor:
        out = torch.empty(tokens * sum(self.shape.rows), dtype=self.dtype, device=self.device)
        queue = gpu.queue_for(self.device)
        plan = plans.plan(group.rows, order, tokens, queue.properties, variant, self.kind)
        workspace = self._workspace(plan.workspace_bytes)
        fused.linear(queue, group, self.x.data_ptr(), tokens, out.data_ptr(), workspace.data_ptr(), variant, order)
        return out

    def _workspace(self, nbytes: int) -> torch.Tensor:
        if not self._workspaces or nbytes > self._workspaces[-1].numel():
            self._workspaces.append(torch.zeros(nbytes, dtype=torch.uint8, device=self.device))
        return self._workspaces[-1]

    def _operator(self, tokens: int, mode: str, copy: Copy) -> list[torch.Tensor]:
        linear = torch.ops.bitforbit.tiles_linear
        return [
            linear(self.x[:tokens], *parts, None, rows, self.shape.cols, mode, [], self.kind.name)
            for rows, parts in zip(self.shape.rows, copy.parts, strict=True)
        ]

    def _error(self, got: torch.Tensor) -> float:
        """Root mean square of the differences from FP64."""
        x, total = self.x[: got.shape[0]].double(), 0.0
        matrix = self.copies[0].joined
        for begin in range(0, len(matrix), FP64_ROWS):
            exact = x @ matrix[begin : begin + FP64_ROWS].to(self.dtype).double().T
            total += float((got[:, begin : begin + FP64_ROWS].double() - exact).square().sum())
        return (total / got.numel()) ** 0.5


def _each(x: torch.Tensor, matrices: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [_product(x, matrix) for matrix in matrices]


def _product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, matrix.to(x.dtype))
