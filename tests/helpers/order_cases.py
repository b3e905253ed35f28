"""Linears on CPU tensors that sum as a GPU's library might."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from bitforbit.cuda.fused import reference
from bitforbit.cuda.fused.order import Order
from bitforbit.ops.probe import Linear

Words = npt.NDArray[np.uint16]


def words(values: torch.Tensor) -> Words:
    """The bits of BF16 numbers."""
    return values.detach().contiguous().view(torch.int16).numpy().view(np.uint16)


def tensor(bits: Words) -> torch.Tensor:
    """BF16 numbers of these bits."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)


def linear_in(order: Order) -> Linear:
    """``functional.linear`` that sums in an order, for x of any shape."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = reference.linear(words(flat), words(weight), order, None if bias is None else words(bias))
        return tensor(out).view(*x.shape[:-1], len(weight))

    return linear
