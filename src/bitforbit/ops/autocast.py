"""``linear`` under ``torch.autocast("cpu")``: x, weight and bias are cast to its dtype, as those of nn.Linear are."""

from __future__ import annotations

import torch
from torch.nn import functional

from bitforbit.ops.schema import LIBRARY


def register() -> None:
    """Register the kernel; once per process."""
    LIBRARY.impl("linear", _linear, "AutocastCPU")


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
    target = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        x, bias = _cast(x, target), None if bias is None else _cast(bias, target)
        parts = (code, digits, sign_mantissa, tails)
        if dtype == x.dtype:
            return torch.ops.bitforbit.linear.default(x, *parts, bias, kind, rows, cols, rows_per_table, dtype, mode)
        weight = torch.ops.bitforbit.decode.default(*parts, kind, rows, cols, rows_per_table, dtype, 0, rows)
        return functional.linear(x, _cast(weight, target), bias)


def _cast(tensor: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    # Autocast leaves double precision and integers alone.
    return tensor.to(target) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
