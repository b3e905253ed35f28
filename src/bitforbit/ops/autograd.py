"""Gradients of ``linear``: those of x and of the bias. The weight is frozen and decoded again, never saved.

The gradients have the bits that torch gives for ``nn.Linear`` over a frozen weight, so they take the steps that it
takes: ``linear`` (ATen's native/Linear.cpp) is an ``addmm`` over flattened rows where there is a bias and x is
contiguous; else a ``matmul`` (native/LinearAlgebra.cpp: one ``mm`` over folded rows if the strides allow, else a
``bmm``), to which the bias is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    ctx.x_shape, ctx.x_stride, ctx.x_contiguous = x.shape, x.stride(), x.is_contiguous()
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = grad_bias = None
    rows = ctx.weight[1]
    if ctx.needs_input_grad[0]:
        weight = torch.ops.bitforbit.decode.default(*ctx.saved_tensors, *ctx.weight, 0, rows)
        flattened = ctx.has_bias and ctx.x_contiguous
        grad_x = _grad_x(grad, weight, ctx.x_shape, ctx.x_stride, flattened)
    if ctx.has_bias and ctx.needs_input_grad[5]:
        if ctx.x_contiguous and grad.dim() > 1:
            grad = grad.reshape(-1, rows)
        leading = list(range(grad.dim() - 1))
        grad_bias = grad.sum(leading) if leading else grad
    return grad_x, None, None, None, None, grad_bias, None, None, None, None, None, None


def _grad_x(
    grad: torch.Tensor, weight: torch.Tensor, shape: Sequence[int], stride: Sequence[int], flattened: bool
) -> torch.Tensor:
    rows, cols = weight.shape
    if len(shape) > 2 and not flattened and not _folds(shape, stride):
        product = grad.reshape(-1, grad.shape[-2], rows).bmm(weight.expand(math.prod(shape[:-2]), rows, cols))
        return product.view(shape)
    flat = grad.reshape(-1, rows)
    if len(shape) > 1 and (stride[-2], stride[-1]) == (1, flat.shape[0]):
        return weight.t().mm(flat.t()).t().reshape(shape)  # x lies column by column: so does its gradient
    return flat.mm(weight).view(shape)


def _folds(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether matmul sees x as one matrix of rows without copying it."""
    empty = any(size == 0 for size in shape)
    return empty or all(stride[i] == stride[i + 1] * shape[i + 1] for i in range(len(shape) - 2))
