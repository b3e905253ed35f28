"""Exact attention over tokens that come in parts: a running maximum, sum and output (arXiv 2205.14135, section 3.1).

FP32 throughout. Scores exist for a block of queries and keys at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

BLOCK_QUERIES = 256
BLOCK_KEYS = 512
_LOWEST = torch.finfo(torch.float32).min
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def without_autograd(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Run a function without gradients, and in the dtypes that it says even under autocast."""

    @wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.no_grad():
            autocast = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
            with ExitStack() as stack:
                for device in autocast:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)

    return run


class OnlineSoftmax:
    """Attention of ``q`` [Hq, Lq, D] over ``heads`` key-value heads."""

    def __init__(
        self, q: Tensor, heads: int, scaling: float, softcap: float | None = None,
        seed: tuple[Tensor, Tensor] | None = None, width: int | None = None,
    ) -> None:  # fmt: skip
        """``width``: channels of a value, if not D.

        ``seed``: output [Hq, Lq, width] and logarithm of the sum [Hq, Lq], float32, of tokens that were attended.
        """
        self._q, self._heads, self._scaling, self._softcap = q, heads, scaling, softcap
        shape = (heads, q.shape[0] // heads, q.shape[1])
        if seed is None:
            self._out = torch.zeros((*shape, width or q.shape[2]), dtype=torch.float32, device=q.device)
            self._maximum = torch.full(shape, float("-inf"), dtype=torch.float32, device=q.device)
            self._sum = torch.zeros_like(self._maximum)
        else:
            self._out, self._maximum = seed[0].view(*shape, -1), seed[1].view(shape)
            self._sum = (self._maximum > float("-inf")).float()

    def add(self, k: Tensor, v: Tensor, mask: Tensor | None = None, behind: int | None = None) -> None:
        """Attend to tokens ``[H, n, D]`` too.

        ``mask`` [1 or Hq, Lq, n]: bool, True is seen, or floats that are added. ``behind``: query i sees tokens up to
        i + behind.
        """
        for query in range(0, self._q.shape[1], BLOCK_QUERIES):
            queries = slice(query, min(query + BLOCK_QUERIES, self._q.shape[1]))
            for key in range(0, k.shape[1], BLOCK_KEYS):
                keys = slice(key, min(key + BLOCK_KEYS, k.shape[1]))
                if behind is not None and keys.start > queries.stop - 1 + behind:
                    break
                seen = None if mask is None else mask[:, queries, keys]
                diagonal = None if behind is None else queries.start + behind - keys.start
                self._add_block(queries, k[:, keys], v[:, keys], seen, diagonal)

    def _add_block(self, queries: slice, k: Tensor, v: Tensor, mask: Tensor | None, diagonal: int | None) -> None:
        q = self._q[:, queries].float()
        count = q.shape[1]
        # Query heads of a key head are rows of one product.
        scores = q.reshape(self._heads, -1, q.shape[2]) @ k.float().mT * self._scaling
        if self._softcap is not None:
            scores = self._softcap * torch.tanh(scores / self._softcap)
        scores = scores.unflatten(1, (-1, count))  # [H, Hq / H, queries, keys]
        if mask is not None:
            mask = mask.unflatten(0, (self._heads, -1)) if mask.shape[0] > 1 else mask[None]
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask.float()
        if diagonal is not None and diagonal < k.shape[1] - 1:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal + 1)
            scores = scores.masked_fill(above, float("-inf"))
        factor, maximum = self._rescale(scores.amax(-1), queries)
        weights = torch.exp(scores - maximum[..., None])
        product = (weights.flatten(1, 2) @ v.float()).unflatten(1, (-1, count))
        self._out[:, :, queries] = self._out[:, :, queries] * factor[..., None] + product
        self._sum[:, :, queries] = self._sum[:, :, queries] * factor + weights.sum(-1)

    def _rescale(self, maximum: Tensor, queries: slice) -> tuple[Tensor, Tensor]:
        """What output and sum so far are worth under a new maximum, and the maximum to subtract from scores."""
        old = self._maximum[:, :, queries]
        new = torch.maximum(old, maximum)
        finite = new.clamp_min(_LOWEST)  # where nothing is seen yet, exp(-inf - finite) is 0
        factor = torch.exp(old - finite)
        self._maximum[:, :, queries] = new
        return factor, finite

    def add_sinks(self, sinks: Tensor) -> None:
        """Logits ``[Hq]`` join the denominator."""
        logits = sinks.float().view(self._heads, -1, 1).expand(self._maximum.shape)
        factor, maximum = self._rescale(logits, slice(None))
        self._out *= factor[..., None]
        self._sum = self._sum * factor + torch.exp(logits - maximum)

    def result(self) -> Tensor:
        """Output ``[Hq, Lq, D]`` in float32; zeros where nothing was seen."""
        out = torch.where(self._sum[..., None] > 0, self._out / self._sum[..., None], 0.0)
        return out.flatten(0, 1)

    def logsumexp(self) -> Tensor:
        """Logarithm of the denominator, ``[Hq, Lq]`` in float32; -inf where nothing was seen."""
        return (self._maximum + self._sum.log()).flatten(0, 1)


@without_autograd
def attend_exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scaling: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of ``q`` [B, Hq, Lq, D] over ``k``, ``v`` [B, H, L, D]: output in q's dtype, logarithm of the sum.

    ``mask`` [B or 1, 1 or Hq, Lq, at least L]: bool, True is seen, or floats that are added. ``causal``: the last query
    sees all, the one before it all but one. ``sinks`` [Hq]: logits whose exp joins the denominator. The second result
    is float32 [B, Hq, Lq]. A query that sees nothing gives zeros and -inf. Without gradients.

    For layers with softcap or sinks, which scaled_dot_product_attention lacks; scores take the memory of 256 x 512 per
    head.
    """
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    mask = None if mask is None else mask[..., : k.shape[2]].expand(q.shape[0], -1, -1, -1)
    for row in range(q.shape[0]):
        softmax = OnlineSoftmax(q[row], k.shape[1], scaling, softcap, width=v.shape[3])
        behind = k.shape[2] - q.shape[2] if causal else None
        softmax.add(k[row], v[row], None if mask is None else mask[row], behind)
        if sinks is not None:
            softmax.add_sinks(sinks)
        out[row], lse[row] = softmax.result(), softmax.logsumexp()
    return out, lse
