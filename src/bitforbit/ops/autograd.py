"""Gradients of ``linear``: those of x and of the bias. The weight is frozen and decoded again, never saved.

The products are the ones that torch's own formulas take for a linear over a frozen weight, so the bits are the same.
"""

from __future__ import annotations

from typing import Any

import torch

from bitforbit.ops.schema import LIBRARY


def register() -> None:
    """Register the gradient; once per process."""
    torch.library.register_autograd("bitforbit::linear", _backward, setup_context=_setup_context, lib=LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, *parts, bias, kind, rows, cols, rows_per_table, dtype, _mode = inputs
    ctx.save_for_backward(*parts)
    ctx.weight = (kind, rows, cols, rows_per_table, dtype)
    ctx.x_shape, ctx.x_stride = x.shape, x.stride()
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = grad_bias = None
    kind, rows, cols, rows_per_table, dtype = ctx.weight
    if ctx.needs_input_grad[0]:
        weight = torch.ops.bitforbit.decode.default(
            *ctx.saved_tensors, kind, rows, cols, rows_per_table, dtype, 0, rows
        )
        grad_x = grad.reshape(-1, rows).mm(weight).view(ctx.x_shape)
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, rows).sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None, None, None, None, None
