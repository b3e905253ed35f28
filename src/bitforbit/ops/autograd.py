"""Gradients of the linears: those of x and of the bias. The weight is frozen and decoded again, never saved.

The gradients have the bits that torch gives for ``nn.Linear`` over a frozen weight, so they take the steps that it
takes: ``linear`` (ATen's native/Linear.cpp) is an ``addmm`` over flattened rows where there is a bias and x is
contiguous; else a ``matmul`` (native/LinearAlgebra.cpp: one ``mm`` over folded rows if the strides allow, else a
``bmm``), to which the bias is added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bitforbit.ops.schema import LIBRARY

Decoder = Callable[[tuple[torch.Tensor, ...], tuple[Any, ...]], torch.Tensor]
"""(parts, what else describes the weight) -> the decoded matrix ``[rows, cols]``."""

_PARTS = slice(1, 5)
_BIAS = 5
_FIRST_FIELD = 6
FIELDS = {"linear": (0, 1, 2, 3, 4), "tiles_linear": (0, 1, 4), "df11_linear": (0, 1, 2, 3)}
"""Which of the inputs after the bias describe the weight."""


def register() -> None:
    """Register the gradients; once per process.

    Inputs of every linear: x, four parts, bias, what describes the weight, mode, what else there is.
    """
    for name, decode in DECODERS.items():
        torch.library.register_autograd(
            f"bitforbit::{name}", functools.partial(_backward, decode),
            setup_context=functools.partial(_setup_context, FIELDS[name]), lib=LIBRARY,
        )  # fmt: skip
    for key in ("AutogradCPU", "AutogradCUDA"):
        LIBRARY.impl("tiles_linears", _tiles_linears, key)


def _tiles_linears(
    x: torch.Tensor, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], rows: Sequence[int],
    cols: int, mode: str, group: Sequence[int] = (), kind: str = "BF16",
) -> list[torch.Tensor]:  # fmt: skip
    """Several products of one x: where a gradient is needed, those that there is one for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *biases)):
        return one_by_one(x, parts, biases, rows, cols, mode, group, kind)
    with torch._C._AutoDispatchBelowAutograd():
        together: list[torch.Tensor] = torch.ops.bitforbit.tiles_linears.default(
            x, parts, biases, rows, cols, mode, group, kind
        )
        return together


def one_by_one(
    x: torch.Tensor, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], rows: Sequence[int],
    cols: int, mode: str, group: Sequence[int] = (), kind: str = "BF16",
) -> list[torch.Tensor]:  # fmt: skip
    """What ``tiles_linears`` computes, by operators for one product each, with the same bits."""
    op, group = torch.ops.bitforbit.tiles_linear.default, list(group) or list(rows)
    return [
        op(x, *parts[4 * i : 4 * i + 4], bias, count, cols, mode, group, kind)
        for i, (count, bias) in enumerate(zip(rows, biases, strict=True))
    ]


def _planes(parts: tuple[torch.Tensor, ...], weight: tuple[Any, ...]) -> torch.Tensor:
    return torch.ops.bitforbit.decode.default(*parts, *weight, 0, weight[1])


def _tiles(parts: tuple[torch.Tensor, ...], weight: tuple[Any, ...]) -> torch.Tensor:
    rows, cols, kind = weight
    return torch.ops.bitforbit.tiles_decode.default(*parts, rows, cols, 0, rows, kind)


def _df11(parts: tuple[torch.Tensor, ...], weight: tuple[Any, ...]) -> torch.Tensor:
    elements, begin, rows, cols = weight
    return torch.ops.bitforbit.df11_decode.default(*parts, elements, begin, begin + rows * cols).view(rows, cols)


DECODERS: dict[str, Decoder] = {"linear": _planes, "tiles_linear": _tiles, "df11_linear": _df11}
"""How each linear's weight is decoded."""


def _setup_context(fields: tuple[int, ...], ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias = inputs[0], inputs[_BIAS]
    ctx.save_for_backward(*inputs[_PARTS])
    ctx.weight = tuple(inputs[_FIRST_FIELD + field] for field in fields)
    ctx.inputs = len(inputs)
    ctx.x_shape, ctx.x_stride, ctx.x_contiguous = x.shape, x.stride(), x.is_contiguous()
    ctx.has_bias = bias is not None


def _backward(decode: Decoder, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = decode(ctx.saved_tensors, ctx.weight).to(grad.dtype)  # FP8 has been multiplied so
        flattened = ctx.has_bias and ctx.x_contiguous
        grad_x = _grad_x(grad, weight, ctx.x_shape, ctx.x_stride, flattened)
    if ctx.has_bias and ctx.needs_input_grad[_BIAS]:
        if ctx.x_contiguous and grad.dim() > 1:
            grad = grad.reshape(-1, grad.shape[-1])
        leading = list(range(grad.dim() - 1))
        grad_bias = grad.sum(leading) if leading else grad
    return grad_x, None, None, None, None, grad_bias, *(None for _ in range(ctx.inputs - _FIRST_FIELD))


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
