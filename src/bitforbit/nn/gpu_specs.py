"""Compressed parameters in GPU memory, in layouts that are never written to a file.

``tiles`` is packed from ``planes`` when a parameter comes to a GPU (:mod:`bitforbit.cuda.tiles.layout`). ``df11`` is a
unit of a DFloat11 checkpoint as it is: the matrices of a block of the model share its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitforbit.cuda.tiles import kinds
from bitforbit.cuda.tiles import layout as tiles_layout
from bitforbit.nn.spec import CompressedSpec, Parameters, Parts
from bitforbit.ops import direct
from bitforbit.ops.schema import TILES_DTYPES

TILES_KINDS = {dtype: kind for kind, dtype in TILES_DTYPES.items()}
"""Dtypes of parameters that can be in tiles, and what the operators call them."""

DF11_PARTS = ("tables", "stream", "sign_mantissa", "index")

ESCAPE_BYTES_PER_WEIGHT = 0.045
"""What :func:`expected_tiles_bytes` reserves: 2 bytes for each of the 1.2 to 2 % of weights that escape, and some."""


@dataclass(frozen=True)
class TilesSpec(CompressedSpec):
    """A parameter in BF16, FP16 or FP8 (E4M3), in tiles of 16 rows and 64 columns of its matrix view."""

    layout = "tiles"
    part_names = tiles_layout.PARTS

    rows: int
    cols: int

    @property
    def kind(self) -> str:
        """What the operators call its dtype."""
        return TILES_KINDS[self.dtype]

    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix view."""
        return self.rows, self.cols

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether parts of these lengths in bytes can be this parameter's."""
        layout, escapes = tiles_layout.TileLayout(self.rows, self.cols, kinds.of(self.kind)), sizes.get("escapes", 0)
        return escapes >= tiles_layout.ALIGNMENT and dict(sizes) == {
            "tiles": layout.tiles_bytes,
            "escapes": tiles_layout.padded(escapes),
            "offsets": layout.offsets_bytes,
            "header": tiles_layout.HEADER_BYTES,
        }

    def decode(self, parts: Parts, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the matrix view."""
        rows: torch.Tensor = torch.ops.bitforbit.tiles_decode.default(
            *parts, self.rows, self.cols, begin, end, self.kind
        )
        return rows

    def linear(
        self, x: torch.Tensor, own: Parameters, bias: torch.Tensor | None, mode: str, group: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """``x @ weight.T + bias``; ``group``: rows of the matrices that it may be multiplied together with."""
        return direct.tiles_linear(
            x, own["tiles__weight"], own["escapes__weight"], own["offsets__weight"], own["header__weight"], bias,
            self.rows, self.cols, mode, group, self.kind,
        )  # fmt: skip

    def embedding(self, ids: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Rows by number."""
        tiles, escapes, offsets, header = parts
        return direct.tiles_embedding(ids, tiles, escapes, offsets, header, self.rows, self.cols, self.kind)


def expected_tiles_bytes(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that a matrix takes as tiles, as is to be expected of a model's weights: an estimate."""
    layout = tiles_layout.TileLayout(rows, cols, kinds.of(TILES_KINDS[dtype]))
    escapes = int(ESCAPE_BYTES_PER_WEIGHT * rows * cols) + tiles_layout.ALIGNMENT
    return layout.tiles_bytes + layout.offsets_bytes + tiles_layout.HEADER_BYTES + escapes


@dataclass(frozen=True)
class Df11Spec(CompressedSpec):
    """A BF16 matrix that begins at element ``begin`` of a DFloat11 unit of ``unit_elements``."""

    layout = "df11"
    part_names = DF11_PARTS

    rows: int
    cols: int
    unit_elements: int
    begin: int

    @property
    def coded_elements(self) -> int:
        """Number of elements of the unit."""
        return self.unit_elements

    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix view."""
        return self.rows, self.cols

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether parts of these lengths in bytes can be this parameter's, as far as lengths tell."""
        inside = self.begin >= 0 and self.begin + self.elements <= self.unit_elements
        return inside and set(sizes) == set(DF11_PARTS) and sizes["sign_mantissa"] >= self.unit_elements

    def decode(self, parts: Parts, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the matrix view."""
        first, last = (self.begin + row * self.cols for row in (begin, end))
        flat: torch.Tensor = torch.ops.bitforbit.df11_decode.default(*parts, self.unit_elements, first, last)
        return flat.view(end - begin, self.cols)

    def linear(self, x: torch.Tensor, own: Parameters, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
        """``x @ weight.T + bias``."""
        return direct.df11_linear(
            x, own["tables__weight"], own["stream__weight"], own["sign_mantissa__weight"], own["index__weight"], bias,
            self.unit_elements, self.begin, self.rows, self.cols, mode,
        )  # fmt: skip

    def embedding(self, ids: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Rows by number."""
        tables, stream, sign_mantissa, index = parts
        return direct.df11_embedding(
            ids, tables, stream, sign_mantissa, index, self.unit_elements, self.begin, self.rows, self.cols
        )
