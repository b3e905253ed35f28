"""Bytes of weights by how they are kept, and of the memory in which they are decoded.

``bf16``   as they are (the model's own dtype)
``exact``  compressed; decoded, or multiplied directly where the order of sums is proven to be torch's
``fused``  compressed; multiplied directly up to 64 tokens at a time, decoded beyond
``df11``   DFloat11 as published (arXiv 2504.11651, section 2.3.3): one transformer block, the embedding or the head is
           decoded at a time

Compressed weights are tiles on a GPU: exact sizes but for their escapes, for which the allowance of
:func:`bitforbit.nn.gpu_specs.expected_tiles_bytes` is taken. On a CPU they are planes: the sizes of a compressed
checkpoint if that was given, else an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitforbit.cuda.tiles import kinds
from bitforbit.cuda.tiles.layout import ALIGNMENT, HEADER_BYTES, TileLayout
from bitforbit.errors import PlanError
from bitforbit.planner.shapes import ITEM_BYTES, Layer, Matrix

METHODS = ("bf16", "exact", "fused", "df11")

PLANES_BITS = {"BF16": 10.8, "F16": 13.7}
"""Bits per weight in files and in CPU memory, as is to be expected of trained weights: an estimate."""
DF11_BITS = 10.87
"""Bits per weight of DFloat11: the paper's Table 1, Llama 3.1 405B; other language models have 10.81 to 10.91."""
ESCAPE_BYTES = 0.045
"""Bytes per weight that are reserved for escapes of tiles."""
FUSED_TOKENS = 64
"""Products of more tokens are decoded, on GPUs. On CPUs from 49 on."""
CPU_FUSED_TOKENS = 48


class UnknownSizeError(PlanError):
    """Weights whose compressed size cannot be told without them."""


@dataclass(frozen=True)
class Storage:
    """How weights are kept. ``bits``: bits per weight that were asked for, in place of the sizes known here."""

    method: str
    dtype: str
    tiles: bool
    bits: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PlanError(f"expected a mode among {', '.join(METHODS)}, got {self.method!r}")
        if self.bits is not None and not 0 < self.bits <= 64:
            raise PlanError(f"expected bits per weight above 0 and up to 64, got {self.bits}")

    @property
    def item(self) -> int:
        """Bytes of a decoded weight."""
        return ITEM_BYTES[self.dtype]

    @property
    def compressed(self) -> bool:
        """Whether weights are decoded at all."""
        return self.method != "bf16"

    @property
    def source(self) -> str:
        """Where compressed sizes come from."""
        if self.bits is not None:
            return f"{self.bits:g} bits per weight, as given"
        if self.method == "df11":
            return f"{DF11_BITS:g} bits per weight (DFloat11's Table 1)"
        if self.tiles and self.dtype in kinds.NAMES:
            return "tiles in GPU memory, with an allowance for escapes (estimate)"
        return "the compressed checkpoint where it is given, else an estimate"

    def nbytes(self, matrix: Matrix) -> int:
        """Bytes of a matrix as it is kept. Raises UnknownSizeError for some dtypes."""
        if not self.compressed:
            return matrix.elements * self.item
        if self.bits is not None:
            return -(-int(matrix.elements * self.bits) // 8)
        if self.method == "df11":
            return -(-int(matrix.elements * DF11_BITS) // 8)
        if self.tiles and self.dtype in kinds.NAMES:
            return min(self._tiles(matrix), matrix.elements * self.item)
        if matrix.stored is not None:
            return matrix.stored
        if self.dtype not in PLANES_BITS:
            raise UnknownSizeError(
                f"expected weights in BF16 or FP16, got {self.dtype}, whose compressed size depends on the weights; "
                "compress the model and plan for the result, or give --bits-per-weight"
            )
        return -(-int(matrix.elements * PLANES_BITS[self.dtype]) // 8)

    def _tiles(self, matrix: Matrix) -> int:
        layout = TileLayout(matrix.rows * matrix.count, matrix.cols, kinds.of(self.dtype))
        escapes = int(ESCAPE_BYTES * matrix.elements) + ALIGNMENT
        return layout.tiles_bytes + layout.offsets_bytes + HEADER_BYTES + escapes

    def decodes(self, tokens: int) -> bool:
        """Whether a product of so many tokens is taken to decode its weight.

        Exact mode is: that is what it needs until its orders of sums are proven to be torch's, on each machine.
        """
        if not self.compressed:
            return False
        if self.method in ("exact", "df11"):
            return True
        return tokens > (FUSED_TOKENS if self.tiles else CPU_FUSED_TOKENS)

    def scratch(self, layers: tuple[Layer, ...], ends: tuple[Matrix, ...], call: int, batch: int) -> int:
        """Bytes of decoded weights at a time, in calls of ``call`` tokens.

        ``ends``: what is decoded as a whole beside the layers: the head, for ``batch`` tokens; in DFloat11 the
        embedding, too.
        """
        if self.method == "df11":
            blocks = [sum(m.elements for m in layer.matrices) * self.item for layer in layers]
            return max([*blocks, *(m.elements * self.item for m in ends)], default=0)
        sizes: list[int] = []
        if self.decodes(call):
            sizes = [m.elements * self.item for layer in layers for m in layer.matrices]
        if self.decodes(batch):
            sizes += [m.elements * self.item for m in ends]
        if not self.tiles:
            return max(sizes, default=0)
        # The next one is decoded ahead.
        return max((sum(sizes[i : i + 2]) for i in range(len(sizes))), default=0)
