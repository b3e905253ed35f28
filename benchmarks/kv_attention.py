"""Decoding attention over a quantized cache against torch's over the BF16 cache: one token, Llama-3.1-8B's heads.

32 query heads share 8 key-value heads of 128 channels; groups of 32, an exact window of 128. torch's ways: ``gqa``
(scaled_dot_product_attention with enable_gqa), ``repeat`` (keys and values repeated first, as transformers does),
``grouped`` (query heads of a key-value head as rows of one query: reads the cache once; no framework does it today).
Before anything is timed, every way must be near FP64 on its own cache. Copies of a cache take turns, so that short
contexts do not stay in a CPU cache; the ways take turns too, and medians count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.common import paired, save, table
from bitforbit import cpu
from bitforbit.cpu import kv, threads
from bitforbit.kv.layout import SEGMENT_TOKENS, KvLayout
from bitforbit.kv.spec import KiviSpec

if TYPE_CHECKING:
    import torch

QUERY_HEADS, HEADS, HEAD_DIM = 32, 8, 128
CONTEXTS = (1024, 8192, 32768)
BITS = ((8, 8), (4, 4), (4, 2), (2, 2))
BYTES_AT_LEAST = 96 << 20
"""Size of all copies of one BF16 cache: more than the last level of cache."""
ROUNDS = 9


@dataclass
class Packed:
    """A quantized cache of one row."""

    spec: KiviSpec
    segments: list[torch.Tensor]
    window_k: torch.Tensor
    window_v: torch.Tensor
    start: torch.Tensor
    tokens: int

    @property
    def nbytes(self) -> int:
        """Of the segments' used part and of the windows."""
        layout = KvLayout(self.spec, HEAD_DIM)
        packed = HEADS * layout.record_bytes * self.tokens // SEGMENT_TOKENS
        return packed + 2 * self.window_k.nbytes

    def call(self, slots: int) -> kv.KvCall:
        """For the kernels."""
        s = self.spec
        assert s.residual is not None
        return kv.KvCall(
            1, HEADS, HEAD_DIM, s.k_bits, s.v_bits, s.group, s.value_group, s.residual, 0, s.residual + 1, "BF16",
            [x.data_ptr() for x in self.segments], self.window_k.data_ptr(), self.window_v.data_ptr(), 0, 0,
            self.start.data_ptr(), slots,
        )  # fmt: skip


def pack(spec: KiviSpec, k: torch.Tensor, v: torch.Tensor) -> Packed:
    """Quantize keys and values [1, HEADS, T, HEAD_DIM]; the last token is in the window as of the current call."""
    import torch

    tokens = k.shape[2] - 1
    assert spec.residual is not None
    record = KvLayout(spec, HEAD_DIM).record_bytes
    segments = [
        torch.zeros(1, HEADS, record, dtype=torch.uint8)
        for _ in range(-(-spec.keys_quantized(tokens) // SEGMENT_TOKENS))
    ]
    window = torch.zeros(2, 1, HEADS, spec.residual + 1, HEAD_DIM, dtype=torch.bfloat16)
    packed = Packed(spec, segments, window[0], window[1], torch.zeros(1, dtype=torch.int32), tokens)
    strides = (0, k.stride(1), k.stride(2), 0, v.stride(1), v.stride(2))
    kv.flush(packed.call(0), tokens, k.data_ptr(), v.data_ptr(), strides, cpu.default_threads())
    for slot in range(tokens - spec.residual, tokens + 1):
        packed.window_k[:, :, slot % (spec.residual + 1)] = k[:, :, slot]
        packed.window_v[:, :, slot % (spec.residual + 1)] = v[:, :, slot]
    return packed


def ours(packed: Packed, q: torch.Tensor, workers: int, isa: str = "") -> torch.Tensor:
    """Attention of q [1, QUERY_HEADS, 1, HEAD_DIM]."""
    import torch

    out = torch.empty_like(q)
    with cpu.force(isa or cpu.active()):
        kv.attend(
            packed.call(packed.tokens), packed.tokens + 1, q.data_ptr(), (0, HEAD_DIM, 0), QUERY_HEADS // HEADS, 1,
            HEAD_DIM**-0.5, 0.0, 0, 0, (0, 0, 0), out.data_ptr(), False, 0, workers,
        )  # fmt: skip
    return out


def gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch with enable_gqa."""
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeat(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch after repeat_kv."""
    import torch

    def repeated(x: torch.Tensor) -> torch.Tensor:
        shape = (1, HEADS, QUERY_HEADS // HEADS, x.shape[2], HEAD_DIM)
        return x[:, :, None].expand(shape).reshape(1, QUERY_HEADS, x.shape[2], HEAD_DIM)

    return torch.nn.functional.scaled_dot_product_attention(q, repeated(k), repeated(v))


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch with the query heads of a key-value head as query rows."""
    import torch

    rows = q.view(1, HEADS, QUERY_HEADS // HEADS, HEAD_DIM)
    return torch.nn.functional.scaled_dot_product_attention(rows, k, v).view(q.shape)


TORCH = {"gqa": gqa, "repeat": repeat, "grouped": grouped}


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FP64."""
    return grouped(q.double(), k.double(), v.double())


def dequantized(packed: Packed, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache that a packed one stands for, FP64, read through the kernels: keys and values as sums with units."""
    from benchmarks.kv_dequantize import dequantize

    return dequantize(packed.spec, packed.segments, k, v)


def name_of(bits: tuple[int, int]) -> str:
    """k4v2."""
    return f"k{bits[0]}v{bits[1]}"
