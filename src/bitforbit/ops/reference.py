"""The order of sums of ``mode="fused"`` in plain torch: slow, easy to read, the oracle of the native kernels.

Each output has 16 FP32 lanes that start at +0. K, padded with zeros, is walked in chunks of 32 columns: lane l takes
column 2l + 1 of the chunk, then column 2l, each by a fused multiply-add that rounds once to nearest even, reads
denormals as zeros and flushes denormal results to zero. Lanes are then added as a tree: l and l + 8, then 4, 2, 1.
"""

from __future__ import annotations

import torch
from torch.nn import functional

CHUNK = 32
LANES = 16
_MIN_NORMAL = 2.0**-126


def lanes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``, ``[..., N]``, for x ``[..., K]`` in BF16 or FP32 and weight ``[N, K]``."""
    pad = -x.shape[-1] % CHUNK
    a = functional.pad(_flush(x.reshape(-1, x.shape[-1]).float()), (0, pad)).unflatten(1, (-1, LANES, 2))
    w = functional.pad(_flush(weight.float()), (0, pad)).unflatten(1, (-1, LANES, 2))
    acc = torch.zeros(len(a), len(w), LANES)
    for chunk in range(a.shape[1]):
        for column in (1, 0):
            acc = _fma(a[:, None, chunk, :, column], w[None, :, chunk, :, column], acc)
    for half in (8, 4, 2, 1):
        acc = _flush(acc[..., :half] + acc[..., half : 2 * half])
    total = acc[..., 0]
    if bias is not None:
        total = _flush(total + _flush(bias.float()))
    return total.to(x.dtype).reshape(*x.shape[:-1], len(w))


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a * b + c`` of FP32 tensors, rounded once; the result is flushed, the arguments are flushed already."""
    product, addend = a.double() * b.double(), c.double()  # both exact
    total = product + addend
    # What the sum lost (Knuth's two-sum). Rounding to odd keeps it visible to the second rounding, to FP32.
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    inexact_even = (lost != 0) & ~lost.isnan() & (bits & 1 == 0)
    away = (lost > 0) == (total > 0)
    odd = torch.where(inexact_even, torch.where(away, bits + 1, bits - 1), bits).view(torch.float64)
    return _flush(odd.float())


def _flush(t: torch.Tensor) -> torch.Tensor:
    """Denormals become zeros of their sign."""
    return torch.where(t.abs() < _MIN_NORMAL, t * 0.0, t)
