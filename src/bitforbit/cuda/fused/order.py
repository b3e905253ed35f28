"""The order of summation, as data: what a product's bits depend on besides its operands.

A matrix's columns are cut into *splits*, whole tiles of 64 columns each. Within a split an accumulator, FP32 and at
first 0, takes the products of 16 columns per matrix instruction, in ascending order; columns after the last are zeros.
The splits' accumulators are added in ascending order, in FP32; then the bias, in FP32; then the sum is rounded to BF16.
How one instruction sums its 16 products and the accumulator is the hardware's business; it looks at no other row or
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from bitforbit.cuda.fused import tuned
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles.layout import TILE_COLS, TILE_ROWS
from bitforbit.errors import UsageError

UNIT_STRIPES = 8
"""Stripes that the number of splits is computed with: of a block, where there are few tokens."""
BLOCKS_PER_MULTIPROCESSOR = 2
FIXED_TILES = 6
"""Estimate: what a block's start and end cost, in tiles of each of its warps."""
SUMS_TILES = 2
"""Estimate: what it costs a block that its sums go through memory, in the same unit."""
SPLIT_TILES = 0.5
"""Estimate: what another split to be added costs the last block, in the same unit."""
LARGEST_SPLITS = 16


@dataclass(frozen=True)
class Order:
    """Order of the sums over ``cols`` products."""

    cols: int
    splits: int
    instruction: str = "mma.m16n8k16"
    k_step: int = 16

    def __post_init__(self) -> None:
        """Raise UsageError for more splits than there are tiles."""
        if not 0 < self.splits <= -(-self.cols // TILE_COLS):
            raise UsageError(
                f"expected 1 to {-(-self.cols // TILE_COLS)} splits of {self.cols} columns, got {self.splits}"
            )

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Columns [begin, end) of each split; the last end is a multiple of 64."""
        tiles = -(-self.cols // TILE_COLS)
        at = [tiles * split // self.splits * TILE_COLS for split in range(self.splits + 1)]
        return tuple(pairwise(at))


@lru_cache(maxsize=4096)
def choose_order(rows: tuple[int, ...], cols: int, properties: DeviceProperties) -> Order:
    """The order for matrices of so many rows each, in one launch, on a device. The number of tokens plays no part.

    Splits keep all multiprocessors busy where there are few rows: as measured on this kind of GPU (:mod:`tuned`), else
    as estimated. Raises UsageError for no matrix, and for an empty one.
    """
    splits = estimate_splits(rows, cols, properties)
    return Order(cols, tuned.find(rows, cols, properties).splits or splits)


def estimate_splits(rows: tuple[int, ...], cols: int, properties: DeviceProperties) -> int:
    """The number of splits with the lowest estimate of a launch's time, which is no measurement. Raises UsageError."""
    if not rows or min(rows) < 1 or cols < 1:
        raise UsageError(f"expected matrices of at least one row and column, got rows {rows}, {cols} columns")
    tiles = -(-cols // TILE_COLS)
    units = sum(-(-count // (TILE_ROWS * UNIT_STRIPES)) for count in rows)
    slots = properties.multiprocessors * BLOCKS_PER_MULTIPROCESSOR

    def cost(splits: int) -> float:
        block = -(-tiles // splits) + FIXED_TILES + (SUMS_TILES if splits > 1 else 0)
        return -(-units * splits // slots) * block + SPLIT_TILES * (splits - 1)

    return min(range(1, min(LARGEST_SPLITS, tiles) + 1), key=cost)
