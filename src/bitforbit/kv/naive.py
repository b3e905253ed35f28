"""KIVI in plain torch, to be read: the formulas of the quantizer and a cache of lists (arXiv 2402.02750, algorithm 1).

The oracle of everything else in this package. As in the authors' code, and unlike the paper's pseudo-code, a call
attends first and quantizes afterwards.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitforbit.kv.spec import KiviSpec


def params_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales and zeros of a cache of a model's dtype."""
    return torch.float16 if dtype is torch.float16 else torch.bfloat16


def quantize_groups(x: Tensor, bits: int, params: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups ``[..., G]``: codes uint8 ``[..., G]``, scales and zeros ``[...]`` of dtype ``params``.

    The formulas are those of :mod:`bitforbit.kv.layout`. A group with NaN or infinity gets NaN and codes 0.
    """
    x, n = x.float(), 2**bits - 1
    lo, hi = x.amin(-1) + 0.0, x.amax(-1)  # -0 becomes +0
    zero = round_down(lo, params).float()
    span = hi - zero
    span = torch.where(span.isinf(), hi / n - zero / n, span / n)
    least = 2.0**-24 if params is torch.float16 else 2.0**-126
    scale = torch.where(hi <= zero, 0.0, round_up(span, params).float().clamp_min(least))
    codes = ((x - zero[..., None]) * (1 / scale)[..., None]).round().clamp(0, n)  # round(): to even
    finite = x.isfinite().all(-1)
    codes = torch.where((finite & (scale > 0))[..., None], codes, 0.0).to(torch.uint8)
    # Conversions give NaN other bits on other machines.
    nan = torch.tensor(0x7E00 if params is torch.float16 else 0x7FC0, dtype=torch.int16, device=x.device).view(params)
    return codes, torch.where(finite, scale.to(params), nan), torch.where(finite, zero.to(params), nan)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``zero + scale * code`` in float32: a product, then a sum. Shapes must broadcast."""
    return zero.float() + scale.float() * codes.float()


def round_down(x: Tensor, params: torch.dtype) -> Tensor:
    """The greatest finite number of a 16-bit dtype that is not above x (float32); the least one if all are."""
    near = x.to(params)
    bits = near.view(torch.int16)
    below = torch.where(bits > 0, bits - 1, bits + 1).to(torch.int16)  # towards -inf: magnitude down, or up
    below = torch.where(bits << 1 == 0, torch.tensor(-0x7FFF, dtype=torch.int16, device=x.device), below)
    down = torch.where(near.float() > x, below.view(params), near)
    return down.clamp_min(torch.finfo(params).min)


def round_up(x: Tensor, params: torch.dtype) -> Tensor:
    """The least number of a 16-bit dtype that is not below x (float32, not negative)."""
    near = x.to(params)
    return torch.where(near.float() < x, (near.view(torch.int16) + 1).to(torch.int16).view(params), near)


@dataclass
class NaiveRow:
    """One row's cache: lists of tokens, first to last. A token's key or value is ``[H, D]`` in the model's dtype."""

    spec: KiviSpec
    sink_k: list[Tensor] = field(default_factory=list)
    sink_v: list[Tensor] = field(default_factory=list)
    key_groups: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Of ``group`` tokens: codes ``[H, D, G]``, scales and zeros ``[H, D]``."""
    value_tokens: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Of one token: codes ``[H, D/v_group, v_group]``, scales and zeros ``[H, D/v_group]``."""
    exact_k: list[Tensor] = field(default_factory=list)
    exact_v: list[Tensor] = field(default_factory=list)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens ``[H, q, D]``, which stay exact until :meth:`flush`."""
        for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
            sinking = len(self.sink_k) < self.spec.sink
            (self.sink_k if sinking else self.exact_k).append(key)
            (self.sink_v if sinking else self.exact_v).append(value)

    def flush(self) -> None:
        """Quantize the keys once there are ``residual`` of them, all but the last ``residual`` values."""
        spec = self.spec
        if spec.residual is None:
            return
        while len(self.exact_k) >= spec.residual:
            keys, self.exact_k = self.exact_k[: spec.residual], self.exact_k[spec.residual :]
            for first in range(0, spec.residual, spec.group):
                group = torch.stack(keys[first : first + spec.group], -1)
                self.key_groups.append(quantize_groups(group, spec.k_bits, params_dtype(group.dtype)))
        while len(self.exact_v) > spec.residual:
            value = self.exact_v.pop(0)
            groups = value.unflatten(-1, (-1, spec.value_group))
            self.value_tokens.append(quantize_groups(groups, spec.v_bits, params_dtype(value.dtype)))

    def crop(self, tokens: int) -> None:
        """Forget all but the first tokens; what is in the exact window again is what its codes say."""
        k, v = (list(x.unbind(1)) for x in self.dequantized())
        quantized_k, quantized_v = self.spec.keys_quantized(tokens), self.spec.values_quantized(tokens)
        sink, dtype = self.spec.sink, (self.sink_k + self.exact_k)[0].dtype
        del self.sink_k[tokens:], self.sink_v[tokens:]
        del self.key_groups[quantized_k // self.spec.group :], self.value_tokens[quantized_v:]
        self.exact_k = [key.to(dtype) for key in k[sink + quantized_k : tokens]]
        self.exact_v = [value.to(dtype) for value in v[sink + quantized_v : tokens]]

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """All keys and values, ``[H, L, D]`` in float32; there must be one at least."""
        k = [torch.stack(tokens, 1).float() for tokens in (self.sink_k, self.exact_k) if tokens]
        v = [torch.stack(tokens, 1).float() for tokens in (self.sink_v, self.exact_v) if tokens]
        if self.key_groups:
            codes, scale, zero = (torch.stack(part, 1) for part in zip(*self.key_groups, strict=True))
            k.insert(len(self.sink_k) > 0, dequantize(codes, scale[..., None], zero[..., None]).mT.flatten(1, 2))
        if self.value_tokens:
            codes, scale, zero = (torch.stack(part, 1) for part in zip(*self.value_tokens, strict=True))
            v.insert(len(self.sink_v) > 0, dequantize(codes, scale[..., None], zero[..., None]).flatten(-2))
        return torch.cat(k, 1), torch.cat(v, 1)


class NaiveKivi:
    """A layer's cache: a row for each of the batch, which starts after the padding."""

    def __init__(self, spec: KiviSpec, start: list[int]) -> None:
        self.spec, self.start, self.slots = spec, list(start), 0
        self.rows = [NaiveRow(spec) for _ in start]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens ``[B, H, q, D]``; padding is left out."""
        for row, start, key, value in zip(self.rows, self.start, k, v, strict=True):
            padding = max(0, start - self.slots)
            row.append(key[:, padding:], value[:, padding:])
        self.slots += k.shape[2]

    def flush(self) -> None:
        """Quantize what has left the exact window: after attention."""
        for row in self.rows:
            row.flush()

    def crop(self, slots: int) -> None:
        """Forget all but the first slots."""
        for b, row in enumerate(self.rows):
            if slots > self.start[b]:
                row.crop(slots - self.start[b])
            else:
                self.rows[b] = NaiveRow(self.spec)
        self.start = [min(start, slots) for start in self.start]
        self.slots = slots

    def reorder(self, index: list[int]) -> None:
        """These rows in place of all."""
        self.rows = [copy.deepcopy(self.rows[b]) for b in index]
        self.start = [self.start[b] for b in index]

    def attend(
        self, q: Tensor, mask: Tensor | None, *, scaling: float, softcap: float | None = None,
        sinks: Tensor | None = None, dtype: torch.dtype = torch.float64,
    ) -> Tensor:  # fmt: skip
        """Attention of ``q`` [B, Hq, Lq, D], the last Lq slots, over the dequantized tokens, in ``dtype``.

        ``mask`` [B, 1 or Hq, Lq, slots]: bool, or added; None: causal. ``sinks`` [Hq]: exp(sink) joins the denominator.
        """
        out = torch.zeros(q.shape, dtype=dtype)
        for b, row in enumerate(self.rows):
            start = self.start[b]
            if start == self.slots:
                continue
            heads = q.shape[1]
            k, v = (x.to(dtype) for x in row.dequantized())
            k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
            seen = None if mask is None else mask[b, :, :, start:]
            out[b] = attention(q[b].to(dtype), k, v, seen, scaling, softcap, sinks)
        return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Softmax attention of ``q`` [H, Lq, D] over ``k``, ``v`` [H, L, D]; see :meth:`NaiveKivi.attend`."""
    scores = q @ k.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[1]]
    return torch.where(weights.isnan(), 0.0, weights) @ v  # a query that sees nothing
