"""Schemas of the operators, and their fakes: shapes and dtypes without data.

The four parts of a weight are one-dimensional uint8 tensors. Layout ``planes`` is that of files (docs/format.md,
section 3): ``kind`` is the float that is coded, ``dtype`` that of the weight: the same but for F32 coded as BF16;
``rows``, ``cols`` and ``rows_per_table`` are those of its matrix view. Layouts ``tiles`` and ``df11`` are those of the
memory of GPUs. Weights in tiles are of a ``kind``: BF16, F16 or F8_E4M3. One in ``df11``, BF16, is elements ``begin``
to ``begin + rows * cols`` of a unit of ``elements``.

A product has the dtype of x, which is that of the weight; weights in FP8 are cast to that of x, BF16, FP16 or FP32.

``group``: the rows of all matrices that a product in mode ``"fused"`` may be computed together with, itself among
them: the order of its sums follows from them, whether it is computed alone or not. Empty: it stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("exact", "fused")
"""``"exact"``: torch's own bits. ``"fused"``: products from the compressed weight, FP32 sums in our fixed order."""

TILES_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
"""Of the weights in tiles, by kind."""

LIBRARY = torch.library.Library("bitforbit", "DEF")

_PLANES = "Tensor code, Tensor digits, Tensor sign_mantissa, Tensor tails"
_PLANES_WEIGHT = "str kind, int rows, int cols, int rows_per_table, ScalarType dtype"
_TILES = "Tensor tiles, Tensor escapes, Tensor offsets, Tensor header"
_DF11 = "Tensor tables, Tensor stream, Tensor sign_mantissa, Tensor index"

_SCHEMAS = (
    f"decode({_PLANES}, {_PLANES_WEIGHT}, int begin, int end) -> Tensor",
    f"embedding(Tensor ids, {_PLANES}, {_PLANES_WEIGHT}) -> Tensor",
    f"linear(Tensor x, {_PLANES}, Tensor? bias, {_PLANES_WEIGHT}, str mode) -> Tensor",
    f"tiles_decode({_TILES}, int rows, int cols, int begin, int end, str kind='BF16') -> Tensor",
    f"tiles_embedding(Tensor ids, {_TILES}, int rows, int cols, str kind='BF16') -> Tensor",
    f"tiles_linear(Tensor x, {_TILES}, Tensor? bias, int rows, int cols, str mode, int[] group=[], str kind='BF16')"
    " -> Tensor",
    "tiles_linears(Tensor x, Tensor[] parts, Tensor?[] biases, int[] rows, int cols, str mode, int[] group=[], "
    "str kind='BF16') -> Tensor[]",
    f"df11_decode({_DF11}, int elements, int begin, int end) -> Tensor",
    f"df11_embedding(Tensor ids, {_DF11}, int elements, int begin, int rows, int cols) -> Tensor",
    f"df11_linear(Tensor x, {_DF11}, Tensor? bias, int elements, int begin, int rows, int cols, str mode) -> Tensor",
)


def define() -> None:
    """Define the operators and register their fakes; once per process."""
    # Which kernel torch picks for a linear depends on the strides of its input: compilers must leave them alone.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for schema in _SCHEMAS:
        LIBRARY.define(schema, tags=tags)
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"bitforbit::{name}", fake, lib=LIBRARY)


def _decode(
    code: Tensor, digits: Tensor, sign_mantissa: Tensor, tails: Tensor,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype, begin: int, end: int,
) -> Tensor:  # fmt: skip
    return code.new_empty((end - begin, cols), dtype=dtype)


def _embedding(
    ids: Tensor, code: Tensor, digits: Tensor, sign_mantissa: Tensor, tails: Tensor,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return code.new_empty((*ids.shape, cols), dtype=dtype)


def _linear(
    x: Tensor, code: Tensor, digits: Tensor, sign_mantissa: Tensor, tails: Tensor, bias: Tensor | None,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype, mode: str,
) -> Tensor:  # fmt: skip
    return _product(x, rows, cols)


def _tiles_decode(
    tiles: Tensor, escapes: Tensor, offsets: Tensor, header: Tensor, rows: int, cols: int, begin: int, end: int,
    kind: str = "BF16",
) -> Tensor:  # fmt: skip
    return tiles.new_empty((end - begin, cols), dtype=TILES_DTYPES[kind])


def _tiles_embedding(
    ids: Tensor, tiles: Tensor, escapes: Tensor, offsets: Tensor, header: Tensor, rows: int, cols: int,
    kind: str = "BF16",
) -> Tensor:  # fmt: skip
    return tiles.new_empty((*ids.shape, cols), dtype=TILES_DTYPES[kind])


def _tiles_linear(
    x: Tensor, tiles: Tensor, escapes: Tensor, offsets: Tensor, header: Tensor, bias: Tensor | None,
    rows: int, cols: int, mode: str, group: Sequence[int] = (), kind: str = "BF16",
) -> Tensor:  # fmt: skip
    return _product(x, rows, cols)


def _tiles_linears(
    x: Tensor, parts: Sequence[Tensor], biases: Sequence[Tensor | None], rows: Sequence[int], cols: int, mode: str,
    group: Sequence[int] = (), kind: str = "BF16",
) -> list[Tensor]:  # fmt: skip
    return [_product(x, count, cols) for count in rows]


def _df11_decode(
    tables: Tensor, stream: Tensor, sign_mantissa: Tensor, index: Tensor, elements: int, begin: int, end: int
) -> Tensor:
    return tables.new_empty(end - begin, dtype=torch.bfloat16)


def _df11_embedding(
    ids: Tensor, tables: Tensor, stream: Tensor, sign_mantissa: Tensor, index: Tensor,
    elements: int, begin: int, rows: int, cols: int,
) -> Tensor:  # fmt: skip
    return tables.new_empty((*ids.shape, cols), dtype=torch.bfloat16)


def _df11_linear(
    x: Tensor, tables: Tensor, stream: Tensor, sign_mantissa: Tensor, index: Tensor, bias: Tensor | None,
    elements: int, begin: int, rows: int, cols: int, mode: str,
) -> Tensor:  # fmt: skip
    return _product(x, rows, cols)


def _product(x: Tensor, rows: int, cols: int) -> Tensor:
    torch._check(x.shape[-1] == cols, lambda: f"expected x of {cols} columns, got shape {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], rows))


_FAKES = {
    "decode": _decode,
    "embedding": _embedding,
    "linear": _linear,
    "tiles_decode": _tiles_decode,
    "tiles_embedding": _tiles_embedding,
    "tiles_linear": _tiles_linear,
    "tiles_linears": _tiles_linears,
    "df11_decode": _df11_decode,
    "df11_embedding": _df11_embedding,
    "df11_linear": _df11_linear,
}
