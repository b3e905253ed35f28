"""softmax(Q K^T) V with everything in memory at once: the yardstick. FlashAttention (arXiv 2205.14135), section 2.2.

Differentiable, so that autograd gives the gradients that others are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scaling: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, Hq, Lq, Dv]`` and the log-sum-exp of the scores ``[B, Hq, Lq]``, both in ``dtype``.

    ``q`` is ``[B, Hq, Lq, D]``, ``k`` and ``v`` are ``[B, Hkv, Lk, D or Dv]``; query head h reads head h // (Hq / Hkv).
    ``causal``: query i sees the keys up to ``Lk - Lq + i``. ``mask``: bool (true: seen) or float (added to the scores),
    broadcast to ``[B, Hq, Lq, Lk]``. ``scaling``: 1/sqrt(D) unless given. A query that sees nothing: zeros and -inf.
    """
    queries_per_head = q.shape[1] // k.shape[1]
    k = k.to(dtype).repeat_interleave(queries_per_head, 1)
    v = v.to(dtype).repeat_interleave(queries_per_head, 1)
    scores = (q.shape[-1] ** -0.5 if scaling is None else scaling) * (q.to(dtype) @ k.transpose(-1, -2))
    if mask is not None and mask.dtype != torch.bool:
        scores, mask = scores + mask.to(dtype), None
    seen = visible(q.shape[2], k.shape[2], causal, mask, q.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    # -inf - (-inf) would be NaN where nothing is seen; exp(-inf - 0) is the zero that is meant.
    shift = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
    return torch.exp(scores - shift[..., None]) @ v, lse


def visible(
    q_tokens: int, kv_tokens: int, causal: bool, mask: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Which key is seen by which query: bool, broadcast to ``[B, H, q_tokens, kv_tokens]``."""
    seen = torch.ones(q_tokens, kv_tokens, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(kv_tokens - q_tokens)
    return seen[None, None] if mask is None else seen & mask
