"""A cache and its oracle, led through the same calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bitforbit.attention.quantized import attend
from bitforbit.kv.naive import NaiveKivi
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 5e-6}
"""Of outputs that are about 1 at most."""


@dataclass
class Pair:
    """The state and the naive cache of one layer."""

    spec: KiviSpec
    start: list[int]
    heads: int = 2
    query_heads: int = 4
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    device: str = "cpu"
    """Of the state; the naive cache is on the CPU."""
    state: KvState = field(init=False)
    naive: NaiveKivi = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        sizes = (len(self.start), self.heads, self.head_dim)
        self.state = KvState(self.spec, *sizes, dtype=self.dtype, device=self.device, name="layer 0")
        self.naive = NaiveKivi(self.spec, self.start)

    def tensor(self, heads: int, count: int) -> torch.Tensor:
        """Random ``[B, heads, count, D]``, with the strides that a model's projections give."""
        x = torch.randn((len(self.naive.rows), count, heads, self.head_dim), generator=self.random)
        return x.to(self.dtype).transpose(1, 2)

    def padding_mask(self, count: int) -> torch.Tensor:
        """Bool ``[B, 1, count, slots]``: causal, padding unseen."""
        slots = torch.arange(self.state.slots)
        seen = slots >= torch.tensor(self.naive.start)[:, None]
        causal = slots <= slots[-count:, None]
        return (causal & seen[:, None])[:, None]

    def call(self, count: int, mask: bool = True, flush: bool = True) -> torch.Tensor:
        """Some tokens: append, attend on both sides, compare, flush; the output."""
        k, v = self.tensor(self.heads, count), self.tensor(self.heads, count)
        q = self.tensor(self.query_heads, count)
        self.state.append(k.to(self.device), v.to(self.device))
        self.naive.append(k, v)
        padding = self.padding_mask(count)
        seen = padding.to(self.device)
        self.state.set_padding(seen)
        scaling = self.head_dim**-0.5
        out = attend(q.to(self.device), self.state, seen if mask else None, scaling=scaling).cpu()
        expected = self.naive.attend(q, padding if mask else None, scaling=scaling)
        error = (out.double() - expected).abs().max().item()
        assert error < TOLERANCE[self.dtype], f"attention of {count} tokens: off by {error}"
        if flush:
            self.flush()
        return out

    def flush(self) -> None:
        """On both sides, and compare what there is then."""
        self.state.flush()
        self.naive.flush()
        self.compare()

    def crop(self, slots: int) -> None:
        self.state.crop(slots)
        self.naive.crop(slots)
        self.compare()

    def reorder(self, index: list[int]) -> None:
        self.state.reorder(torch.tensor(index))
        self.naive.reorder(index)
        self.compare()

    def compare(self) -> None:
        """Codes, parameters and exact tokens are the same: every dequantized number is, and nothing else is stored."""
        assert self.state.slots == self.naive.slots
        assert list(self.state.starts) == self.naive.start
        k, v = (x.cpu() for x in self.state.dequantized())
        for b, row in enumerate(self.naive.rows):
            start = self.naive.start[b]
            if start == self.naive.slots:
                continue
            for got, expected in zip((k, v), row.dequantized(), strict=True):
                assert torch.equal(got[b, :, start:], expected)
                assert not got[b, :, :start].any()
        assert len(self.state.segments) * 512 < self.spec.keys_quantized(self.state.slots) + 512
