"""Attention to tensors with what SDPA lacks: a cap of the logits (Gemma 2) and attention sinks (gpt-oss)."""

from __future__ import annotations

import torch

_SCRATCH_BYTES = 64 << 20
"""Logits of so many bytes at a time."""


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of ``query`` [B, Hq, q, D] to ``keys`` and ``values`` [B, H, T, D]; the result is [B, q, Hq, D].

    ``mask``: bool or to be added, [B, 1 or Hq, q, T]; None: the last query sees all keys, each before it one less.
    ``sinks``: [Hq], logits that join the denominator alone. Logits are in FP32, ``softcap * tanh(x / softcap)``.
    """
    batch, query_heads, rows, head_dim = query.shape
    heads, length = keys.shape[1], keys.shape[2]
    if mask is None and rows > 1:
        mask = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)[None, None]
    # [B, H, query heads of a key head, q, D]
    grouped = query.reshape(batch, heads, query_heads // heads, rows, head_dim)
    block = max(1, _SCRATCH_BYTES // max(1, 4 * batch * query_heads * length))
    parts = []
    for begin in range(0, rows, block):
        end = min(rows, begin + block)
        logits = torch.matmul(grouped[..., begin:end, :], keys[:, :, None].transpose(-1, -2)).float() * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if mask is not None:
            part = mask[:, :, begin:end]
            part = part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, (heads, -1))
            # Not -inf: a row of padding sees nothing, and its NaN would spread.
            least = torch.finfo(torch.float32).min
            logits = logits.masked_fill(~part, least) if part.dtype == torch.bool else logits + part
        if sinks is not None:
            column = sinks.float().view(1, heads, -1, 1, 1).expand(batch, -1, -1, end - begin, 1)
            logits = torch.cat([logits, column], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., :length].to(values.dtype)
        parts.append(torch.matmul(weights, values[:, :, None]))
    out = torch.cat(parts, dim=-2).flatten(1, 2)
    return out.transpose(1, 2).contiguous()
