"""Attention over a quantized cache that is read packed (:mod:`bitforbit.kv`).

The quantized tokens are taken a segment at a time, each giving its maximum, its sum and its output, which are merged in
order; the exact tokens come last. So a row's result does not depend on the other rows. Kernels read codes; in torch,
which takes what no kernel does, a segment of one row is dequantized at any moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitforbit.attention.online import OnlineSoftmax, without_autograd
from bitforbit.errors import KvCacheError
from bitforbit.kv import kernels, pack
from bitforbit.kv.layout import SEGMENT_TOKENS
from bitforbit.kv.state import KvState

KERNEL_QUERIES = 64
"""Queries per key head, GQA's and tokens', up to which kernels are taken: beyond, matrix products are."""


@without_autograd
def attend(
    q: Tensor, state: KvState, mask: Tensor | None, *, scaling: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of ``q`` [B, Hq, Lq, D], the tokens that were appended last, over the cache; in q's dtype.

    ``mask`` [B or 1, 1 or Hq, Lq, slots or more] over the slots of the padded batch: bool, True is seen, or floats that
    are added; None: causal. Rows' padding is never seen. ``sinks`` [Hq]: logits whose exp joins the denominator. A
    query that sees nothing gives zeros. Sums are FP32. Without gradients. Raises KvCacheError.
    """
    _check(q, state, mask, sinks)
    if mask is not None:
        mask = mask[..., : state.slots].expand(state.batch, -1, -1, -1)
    heads, queries = q.shape[1] // state.heads, q.shape[2]
    if heads * queries > KERNEL_QUERIES or not kernels.can_attend(state, q, mask):
        return attend_torch(q, state, mask, scaling=scaling, softcap=softcap, sinks=sinks)
    if state.pending is None:
        return kernels.attend(state, q, mask, scaling, softcap, sinks)
    before, lse = kernels.attend_before(state, q, mask, scaling, softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for row in range(state.batch):
        softmax = OnlineSoftmax(q[row], state.heads, scaling, softcap, (before[row], lse[row]))
        _add_pending(softmax, state, row, None if mask is None else mask[row])
        out[row] = _result(softmax, sinks)
    return out


@without_autograd
def attend_torch(
    q: Tensor, state: KvState, mask: Tensor | None, *, scaling: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`attend` in torch on any device, row by row, segment by segment."""
    _check(q, state, mask, sinks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if mask is not None:
        mask = mask[..., : state.slots].expand(state.batch, -1, -1, -1)
    for row in range(state.batch):
        softmax = OnlineSoftmax(q[row], state.heads, scaling, softcap)
        _add_before(softmax, state, row, None if mask is None else mask[row])
        _add_pending(softmax, state, row, None if mask is None else mask[row])
        out[row] = _result(softmax, sinks)
    return out


def _check(q: Tensor, state: KvState, mask: Tensor | None, sinks: Tensor | None) -> None:
    if q.dim() != 4 or q.shape[0] != state.batch or q.shape[3] != state.head_dim or q.shape[1] % state.heads:
        raise KvCacheError(
            f"expected queries [{state.batch}, a multiple of {state.heads}, Lq, {state.head_dim}], got {list(q.shape)}"
        )
    new = state.slots - state.flushed
    if q.shape[2] != new or not new:
        raise KvCacheError(f"expected as many queries as tokens were appended ({new}), got {q.shape[2]}")
    if mask is not None and (
        mask.dim() != 4 or mask.shape[0] not in (1, state.batch) or mask.shape[1] not in (1, q.shape[1])
        or mask.shape[2] != new or mask.shape[3] < state.slots
    ):  # fmt: skip
        raise KvCacheError(
            f"expected a mask [{state.batch}, 1 or {q.shape[1]}, {new}, {state.slots}], got {list(mask.shape)}"
        )
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise KvCacheError(f"expected {q.shape[1]} sink logits, one per query head, got {list(sinks.shape)}")


def _result(softmax: OnlineSoftmax, sinks: Tensor | None) -> Tensor:
    if sinks is not None:
        softmax.add_sinks(sinks)
    return softmax.result()


def _add_before(softmax: OnlineSoftmax, state: KvState, row: int, mask: Tensor | None) -> None:
    """Tokens that were there before the call; ``mask`` [1 or Hq, Lq, slots]."""
    spec, start, before = state.spec, state.starts[row], state.tokens(row)
    sink, keys, values = min(spec.sink, before), spec.keys_quantized(before), spec.values_quantized(before)

    def seen(first: int, last: int) -> Tensor | None:
        return None if mask is None else mask[..., start + first : start + last]

    for segment, begin, end in pack.split(0, values):
        record, first = state.segments[segment][row], sink + segment * SEGMENT_TOKENS
        k = pack.read_keys(record, state.layout, begin, end, state.params)
        v = pack.read_values(record, state.layout, begin, end, state.params)
        softmax.add(k, v, seen(first + begin, first + end))
    # Keys leave the window a block at a time, values one by one: of these only the values are exact.
    k, v = state.quantized("k", row, values, keys), state.exact("v", row, sink + values, sink + keys)
    softmax.add(k, v, seen(sink + values, sink + keys))
    softmax.add(state.sink_k[row, :, :sink], state.sink_v[row, :, :sink], seen(0, sink))
    k, v = state.exact("k", row, sink + keys, before), state.exact("v", row, sink + keys, before)
    softmax.add(k, v, seen(sink + keys, before))


def _add_pending(softmax: OnlineSoftmax, state: KvState, row: int, mask: Tensor | None) -> None:
    """The call's own tokens, exact; ``mask`` [1 or Hq, Lq, slots]."""
    first, last = state.tokens(row), state.tokens(row, state.slots)
    k, v = state.exact("k", row, first, last), state.exact("v", row, first, last)
    if mask is None:
        padding = max(0, state.starts[row] - state.flushed)
        softmax.add(k, v, behind=-padding)
    else:
        softmax.add(k, v, mask[..., state.slots - (last - first) :])
