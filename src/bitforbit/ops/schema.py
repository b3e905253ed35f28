"""Schemas of the operators, and their fakes: shapes and dtypes without data.

The four parts of a weight are one-dimensional uint8 tensors (docs/format.md, section 3). ``kind`` is the float that is
coded, ``dtype`` that of the weight: the same but for F32 coded as BF16. ``rows``, ``cols`` and ``rows_per_table`` are
those of its matrix view.
"""

from __future__ import annotations

import torch

MODES = ("exact", "fused")
"""``"exact"``: torch's own bits. ``"fused"``: products from the compressed weight, FP32 sums in our fixed order."""

LIBRARY = torch.library.Library("bitforbit", "DEF")

_PARTS = "Tensor code, Tensor digits, Tensor sign_mantissa, Tensor tails"
_WEIGHT = "str kind, int rows, int cols, int rows_per_table, ScalarType dtype"

_SCHEMAS = (
    f"decode({_PARTS}, {_WEIGHT}, int begin, int end) -> Tensor",
    f"embedding(Tensor ids, {_PARTS}, {_WEIGHT}) -> Tensor",
    f"linear(Tensor x, {_PARTS}, Tensor? bias, {_WEIGHT}, str mode) -> Tensor",
)


def define() -> None:
    """Define the operators and register their fakes; once per process."""
    # Which kernel torch picks for a linear depends on the strides of its input: compilers must leave them alone.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for schema in _SCHEMAS:
        LIBRARY.define(schema, tags=tags)
    for name, fake in (("decode", _decode), ("embedding", _embedding), ("linear", _linear)):
        torch.library.register_fake(f"bitforbit::{name}", fake, lib=LIBRARY)


def _decode(
    code: torch.Tensor,
    digits: torch.Tensor,
    sign_mantissa: torch.Tensor,
    tails: torch.Tensor,
    kind: str,
    rows: int,
    cols: int,
    rows_per_table: int,
    dtype: torch.dtype,
    begin: int,
    end: int,
) -> torch.Tensor:
    return code.new_empty((end - begin, cols), dtype=dtype)


def _embedding(
    ids: torch.Tensor,
    code: torch.Tensor,
    digits: torch.Tensor,
    sign_mantissa: torch.Tensor,
    tails: torch.Tensor,
    kind: str,
    rows: int,
    cols: int,
    rows_per_table: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return code.new_empty((*ids.shape, cols), dtype=dtype)


def _linear(
    x: torch.Tensor,
    code: torch.Tensor,
    digits: torch.Tensor,
    sign_mantissa: torch.Tensor,
    tails: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    rows: int,
    cols: int,
    rows_per_table: int,
    dtype: torch.dtype,
    mode: str,
) -> torch.Tensor:
    torch._check(x.shape[-1] == cols, lambda: f"expected x of {cols} columns, got shape {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], rows))
