"""Attention over a quantized cache that is read packed (:mod:`bitforbit.kv`).

The quantized tokens are taken a segment at a time, each giving its maximum, its sum and its output, which are merged in
order; the exact tokens come last (FlashAttention's online softmax, arXiv 2205.14135, section 3.1). So a row's result
does not depend on the other rows, and at most a segment of a row is dequantized at any moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitforbit.errors import KvCacheError
from bitforbit.kv import pack
from bitforbit.kv.layout import SEGMENT_TOKENS
from bitforbit.kv.state import KvState

BLOCK_QUERIES = 256


def attend(
    q: Tensor, state: KvState, mask: Tensor | None, *, scaling: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of ``q`` [B, Hq, Lq, D], the tokens that were appended last, over the cache; in q's dtype.

    ``mask`` [B, 1 or Hq, Lq, slots] over the slots of the padded batch: bool, True is seen, or floats that are added;
    None: causal. Rows' padding is never seen. ``sinks`` [Hq]: logits whose exp joins the denominator. A query that sees
    nothing gives zeros. Sums are FP32. Raises KvCacheError.
    """
    if q.dim() != 4 or q.shape[0] != state.batch or q.shape[3] != state.head_dim or q.shape[1] % state.heads:
        raise KvCacheError(
            f"expected queries [{state.batch}, a multiple of {state.heads}, Lq, {state.head_dim}], got {list(q.shape)}"
        )
    if q.shape[2] != state.slots - state.flushed:
        raise KvCacheError(
            f"expected as many queries as tokens were appended ({state.slots - state.flushed}), got {q.shape[2]}"
        )
    return attend_torch(q, state, mask, scaling=scaling, softcap=softcap, sinks=sinks)


def attend_torch(
    q: Tensor, state: KvState, mask: Tensor | None, *, scaling: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`attend` in torch, row by row, segment by segment, FP32 throughout."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if mask is not None:
        mask = mask.expand(q.shape[0], -1, -1, -1)
    for row in range(state.batch):
        for first in range(0, q.shape[2], BLOCK_QUERIES):
            rows = slice(first, first + BLOCK_QUERIES)
            merged = Softmax(q[row, :, rows], state.heads, scaling, softcap)
            _attend_row(merged, state, row, None if mask is None else mask[row, :, rows], first, q.shape[2])
            if sinks is not None:
                merged.add_sinks(sinks)
            out[row, :, rows] = merged.result()
    return out


class Softmax:
    """Attention of some queries over tokens that come in parts; the state is a maximum, a sum and an output."""

    def __init__(self, q: Tensor, heads: int, scaling: float, softcap: float | None) -> None:
        """``q`` [Hq, Lq, D] over ``heads`` key-value heads."""
        self.queries = q.shape[1]
        self._q = q.float().reshape(heads, -1, q.shape[2])  # [H, Hq / H * Lq, D]
        self._shape, self._scaling, self._softcap = q.shape, scaling, softcap
        self.maximum = q.new_full((*self._q.shape[:2], 1), float("-inf"), dtype=torch.float32)
        self.sum = torch.zeros_like(self.maximum)
        self.out = torch.zeros_like(self._q)

    def add(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Tokens ``[H, n, D]`` in order; ``mask`` [1 or Hq, Lq, n]."""
        if not k.shape[1]:
            return
        scores = self._q @ k.float().mT * self._scaling
        if self._softcap is not None:
            scores = self._softcap * torch.tanh(scores / self._softcap)
        if mask is not None:
            apart = scores.view(*self._shape[:2], -1)
            apart = apart.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else apart + mask.float()
            scores = apart.view(scores.shape)
        maximum = torch.maximum(self.maximum, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - maximum.clamp_min(torch.finfo(torch.float32).min))
        self._rescale(maximum)
        self.sum += weights.sum(-1, keepdim=True)
        self.out += weights @ v.float()

    def add_sinks(self, sinks: Tensor) -> None:
        """Logits ``[Hq]`` that join the denominator."""
        logits = sinks.float().view(-1, 1).expand(-1, self._shape[1]).reshape(self.maximum.shape)
        maximum = torch.maximum(self.maximum, logits)
        self._rescale(maximum)
        self.sum += torch.exp(logits - maximum)

    def _rescale(self, maximum: Tensor) -> None:
        factor = torch.exp(self.maximum - maximum.clamp_min(torch.finfo(torch.float32).min))
        self.maximum, self.sum, self.out = maximum, self.sum * factor, self.out * factor

    def result(self) -> Tensor:
        """``[Hq, Lq, D]`` in float32; zeros where nothing was seen."""
        return torch.where(self.sum > 0, self.out / self.sum, 0.0).view(self._shape)


def _attend_row(merged: Softmax, state: KvState, row: int, mask: Tensor | None, first_query: int, queries: int) -> None:
    """Add all tokens of a row; ``mask`` [1 or Hq, Lq, slots] and the queries from ``first_query`` on of ``queries``."""
    spec, start = state.spec, state.starts[row]
    before, tokens = state.tokens(row), state.tokens(row, state.slots)
    sink, keys, values = min(spec.sink, before), spec.keys_quantized(before), spec.values_quantized(before)
    if mask is None and queries > 1:  # causal: query i sees slots up to flushed + first_query + i
        last = state.flushed + first_query + torch.arange(merged.queries, device=state.device)
        mask = (torch.arange(state.slots, device=state.device) <= last[:, None])[None]

    def seen(first: int, last: int) -> Tensor | None:
        return None if mask is None else mask[..., start + first : start + last]

    for segment, begin, end in pack.split(0, values):
        record, first = state.segments[segment][row], sink + segment * SEGMENT_TOKENS
        k = pack.read_keys(record, state.layout, begin, end, state.params)
        v = pack.read_values(record, state.layout, begin, end, state.params)
        merged.add(k, v, seen(first + begin, first + end))
    # Keys leave the window a block at a time, values one by one: these have exact values only.
    k, v = state.quantized("k", row, values, keys), state.exact("v", row, sink + values, sink + keys)
    merged.add(k, v, seen(sink + values, sink + keys))
    merged.add(state.sink_k[row, :, :sink], state.sink_v[row, :, :sink], seen(0, sink))
    k, v = state.exact("k", row, sink + keys, tokens), state.exact("v", row, sink + keys, tokens)
    merged.add(k, v, seen(sink + keys, tokens))
