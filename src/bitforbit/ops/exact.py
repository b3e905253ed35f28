"""Which product straight from the compressed weight, if any, has torch's own bits for the linear at hand."""

from __future__ import annotations

import sys

import torch

from bitforbit.cpu.linear import Order
from bitforbit.ops import proven


def order_for(x: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Order | None:
    """The order proven for ``functional.linear(x, weight, bias)`` with a BF16 weight ``[rows, x.shape[-1]]``."""
    if not _is_one_product(x, bias) or _flushes_denormals():
        return None
    cols = x.shape[-1]
    return proven.lookup(rows, cols, x.numel() // cols, torch.get_num_threads(), bias is not None, x.dtype)


def _is_one_product(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether torch computes one ``mm`` or ``addmm`` of dense rows, as proofs assume (ATen's native/Linear.cpp).

    Not so with other strides, which may be a ``bmm``, and where the bias is added to the rounded product.
    """
    if x.dtype is not torch.bfloat16 or not x.is_contiguous() or x.numel() == 0:
        return False
    return bias is None or (x.dim() in (2, 3) and bias.dtype is torch.bfloat16 and bias.is_contiguous())


_LEAST_NORMAL = sys.float_info.min


def _flushes_denormals() -> bool:
    """Whether this thread takes denormals for zeros: by ``torch.set_flush_denormal``, or a library's -ffast-math.

    Torch's kernels then do, ours never do: proofs are about threads that keep denormals.
    """
    return _LEAST_NORMAL * 0.5 == 0.0
