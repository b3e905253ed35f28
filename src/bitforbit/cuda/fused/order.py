"""The order of summation, as data: what a product's bits depend on besides its operands.

A matrix's columns are cut into *splits*, whole tiles of 64 columns each. Within a split an accumulator, FP32 and at
first 0, takes the products of 16 columns per matrix instruction (or 8), in ascending order; columns after the last are
zeros. The splits' accumulators are added in FP32, in ascending order; then the bias, in FP32; then the sum is rounded
to BF16. How one instruction sums its products and the accumulator is the hardware's business; it looks at no other row
or token.

Libraries differ in where they cut, in which order they add the splits, and in what they round in between: all of that
is data here, so that their bits can be had (:mod:`bitforbit.ops.gpu.order_probe`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from bitforbit.cuda.fused import tuned
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles.layout import TILE_COLS, TILE_ROWS
from bitforbit.errors import UsageError

REDUCTIONS = ("ascending", "descending", "neighbours", "halves")
"""How splits are added: one after the other, from the first or the last; as a tree of pairs of neighbours (0 and 1, 2
and 3, then these sums), or of the first half and the second (0 and n/2, 1 and n/2 + 1, then these sums)."""
PARTIALS = ("F32", "BF16", "running BF16")
"""What the sums of splits are rounded to before they are added; with the last one so is what each addition gives."""
INSTRUCTIONS = {"mma.m16n8k16": 16, "mma.m16n8k8": 8, "wgmma.m64nNk16": 16}
"""Matrix instructions that kernels have, with the columns that each takes."""
MOST_TREE_SPLITS = 32
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
    split_tiles: int = 0
    """Tiles of a split, but for the last one, which has what is left; 0: as equal as can be."""
    longer: int = 0
    """So many splits, the first ones, have one tile more than ``split_tiles``."""
    reduction: str = "ascending"
    partials: str = "F32"
    bias_rounded: bool = False
    """Whether the sum is rounded to BF16 before the bias is added, and again after it."""
    instruction: str = "mma.m16n8k16"

    def __post_init__(self) -> None:
        """Raise UsageError for more splits than there are tiles, splits without columns, and unknown names."""
        if not 0 < self.splits <= self.tiles:
            raise UsageError(f"expected 1 to {self.tiles} splits of {self.cols} columns, got {self.splits}")
        fits = self.longer == 0 or 0 < self.longer < self.splits
        if self.split_tiles:
            last = (self.splits - 1) * self.split_tiles + self.longer
            fits = fits and self.split_tiles > 0 and last < self.tiles <= last + self.split_tiles
        elif self.longer:
            fits = False
        if not fits:
            raise UsageError(
                f"expected {self.splits} splits to hold {self.tiles} tiles of columns, each at least one, got splits "
                f"of {self.split_tiles} tiles, {self.longer} of them longer by one"
            )
        known = self.reduction in REDUCTIONS and self.partials in PARTIALS and self.instruction in INSTRUCTIONS
        if not known or (self.reduction in REDUCTIONS[2:] and self.splits > MOST_TREE_SPLITS):
            raise UsageError(
                f"expected a reduction among {REDUCTIONS} (the last two of at most {MOST_TREE_SPLITS} splits), partial "
                f"sums among {PARTIALS}, an instruction among {tuple(INSTRUCTIONS)}, got {self}"
            )

    @cached_property
    def tiles(self) -> int:
        """Tiles that hold the columns."""
        return -(-self.cols // TILE_COLS)

    @property
    def k_step(self) -> int:
        """Columns of an instruction."""
        return INSTRUCTIONS[self.instruction]

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Columns [begin, end) of each split; the last end is a multiple of 64."""
        return tuple(pairwise(TILE_COLS * self._begin(split) for split in range(self.splits + 1)))

    def _begin(self, split: int) -> int:
        if self.split_tiles:
            return min(split * self.split_tiles + min(split, self.longer), self.tiles)
        return self.tiles * split // self.splits

    @property
    def rules(self) -> int:
        """All but the splits' numbers, as kernels take it (kernels/fused.cuh)."""
        bits = REDUCTIONS.index(self.reduction)  # [1:0]
        bits |= (0, 1, 3)[PARTIALS.index(self.partials)] << 2  # [2] round partial sums, [3] sums of them
        bits |= int(self.bias_rounded) << 4  # [4]
        bits |= int(self.k_step == 8) << 5  # [5]
        return bits | self.longer << 8  # [31:8]


@lru_cache(maxsize=4096)
def choose_order(rows: tuple[int, ...], cols: int, properties: DeviceProperties) -> Order:
    """The order for matrices of so many rows each, in one launch, on a device. The number of tokens plays no part.

    Splits keep all multiprocessors busy where there are few rows: as measured on this kind of GPU (:mod:`tuned`), else
    as estimated. Raises UsageError for no matrix, and for an empty one.
    """
    splits, found = estimate_splits(rows, cols, properties), tuned.find(rows, cols, properties)
    return Order(cols, found.splits or splits, instruction=found.instruction or Order.instruction)


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
