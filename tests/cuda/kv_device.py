"""A quantized cache on the device of a queue, beside the one in numpy that says what its bytes and results are."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitforbit.cuda.kv import KvCall, attend, flush, workspace_bytes
from bitforbit.kv.layout import SEGMENT_TOKENS
from bitforbit.kv.spec import KiviSpec
from helpers.kv_cases import DTYPES, Array, Cache, attention

# Head dimension and settings: every pair of bits, every size of groups.
VARIANTS = {
    "32-k4v4": (32, KiviSpec(4, 4, 32, residual=32)),
    "64-k2v2": (64, KiviSpec(2, 2, 64, residual=64)),
    "48-k8v8": (48, KiviSpec(8, 8, 32, 16, residual=64)),
    "80-k8v4": (80, KiviSpec(8, 4, 64, 16, residual=128)),
    "128-k4v2": (128, KiviSpec(4, 2, 128, 128, residual=128)),
    "256-k2v8": (256, KiviSpec(2, 8, 32, 32, residual=32)),
    "96-k4v8": (96, KiviSpec(4, 8, 32, 32, residual=96)),
    "64-k8v2": (64, KiviSpec(8, 2, 32, 32, residual=32)),
    "16-k2v4": (16, KiviSpec(2, 4, 32, 16, residual=32)),
}


@dataclass
class DeviceCache(Cache):
    """Kernels work on copies in the queue's memory, which come back after each call."""

    queue: Any = None
    by_counter: bool = False
    """Launches are made for more slots than there are; a counter in device memory has the true number."""

    def on_device(self, later: int = 0) -> tuple[KvCall, list[Any]]:
        """The call, and what has to be kept; the segments' buffers come first."""
        segments = [self.queue.upload(x.tobytes()) for x in self.segments]
        table = self.queue.upload(struct.pack(f"<{len(segments)}Q", *(x.address for x in segments)) or bytes(8))
        if hasattr(self.queue, "relocate"):
            self.queue.relocate(table.address)
        exact = [self.queue.upload(x.tobytes()) for x in (self.window_k, self.window_v, self.sink_k, self.sink_v)]
        start = self.queue.upload(self.start.tobytes())
        counter = self.queue.upload(struct.pack("<i", self.slots))
        s = self.spec
        assert s.residual is not None
        call = KvCall(
            self.batch, self.heads, self.head_dim, s.k_bits, s.v_bits, s.group, s.value_group, s.residual, s.sink,
            self.capacity, self.dtype, table.address, *(x.address for x in exact), start.address,
            self.slots + (later if self.by_counter else 0), counter.address if self.by_counter else 0,
        )  # fmt: skip
        return call, [*segments, table, *exact, start, counter]

    def grow(self, tokens: int) -> None:
        """A call of so many tokens."""
        end = self.slots + tokens
        while SEGMENT_TOKENS * len(self.segments) < end:
            self.segments.append(np.zeros((self.batch, self.heads, self.layout.record_bytes), np.uint8))
        pending = (0, 0, (0,) * 6)
        kept = []
        if tokens == 1:
            self.show(self.slots, end)
        else:  # strides of their own: keys [B, T, H, D] in memory, values [B, H, T + 3, D]
            dtype, h, d = DTYPES[self.dtype], self.heads, self.head_dim
            keys = np.ascontiguousarray(self.k[:, :, self.slots : end].transpose(0, 2, 1, 3).astype(dtype))
            values = np.full((self.batch, h, tokens + 3, d), np.nan, dtype)
            values[:, :, :tokens] = self.v[:, :, self.slots : end]
            kept = [self.queue.upload(x.tobytes()) for x in (keys, values)]
            strides = (tokens * h * d, d, h * d, h * (tokens + 3) * d, (tokens + 3) * d, d)
            pending = (kept[0].address, kept[1].address, strides)
        call, buffers = self.on_device(later=57)
        bad = self.queue.zeros(4)
        flush(self.queue, call, call.tokens + tokens, bad.address, *pending)
        self.bad += struct.unpack("<I", self.queue.download(bad))[0]
        for segment, buffer in zip(self.segments, buffers, strict=False):
            segment[:] = np.frombuffer(self.queue.download(buffer), np.uint8).reshape(segment.shape)
        if tokens > 1:
            self.show(max(0, end - self.capacity), end)
            for b in range(self.batch):  # the sinks of a long call
                for token in range(min(self.spec.sink, max(0, end - int(self.start[b])))):
                    slot = int(self.start[b]) + token
                    self.sink_k[b, :, token], self.sink_v[b, :, token] = self.k[b, :, slot], self.v[b, :, slot]
        self.slots = end

    def attend(
        self,
        q: Array,
        visible: int,
        *,
        scaling: float,
        softcap: float = 0.0,
        sinks: Array | None = None,
        mask: npt.NDArray[np.bool_] | None = None,
        out_f32: bool = True,
    ) -> tuple[np.ndarray, Array]:
        """Output [B, Hq, Lq, D] as float32 and lse; the token of slot ``visible`` - 1 must be in the window."""
        batch, heads, rows, d = q.shape
        self.show(self.slots, visible)
        call, buffers = self.on_device(later=64)
        x = self.queue.upload(np.ascontiguousarray(q.transpose(0, 2, 1, 3)).astype(DTYPES["BF16"]).tobytes())
        logits = None if sinks is None else self.queue.upload(sinks.astype(np.float32).tobytes())
        seen, strides = None, (0, 0, 0)
        if mask is not None:
            bits = np.ascontiguousarray(mask.astype(np.uint8))
            strides = tuple(0 if n == 1 else s for n, s in zip(bits.shape[:3], bits.strides, strict=False))
            seen = self.queue.upload(bits.tobytes())
        out = self.queue.empty(q.size * (4 if out_f32 else 2))
        lse = self.queue.empty(batch * heads * rows * 4)
        shown = call.tokens + visible - self.slots
        per_head = heads // self.heads
        workspace = self.queue.empty(workspace_bytes(call, shown, per_head, rows))
        attend(
            self.queue, call, shown, x.address, (rows * heads * d, d, heads * d), per_head, rows, scaling, softcap,
            0 if logits is None else logits.address, 0 if seen is None else seen.address, strides, out.address, out_f32,
            lse.address, workspace.address,
        )  # fmt: skip
        del buffers
        got = np.frombuffer(self.queue.download(out), np.float32 if out_f32 else DTYPES["BF16"]).reshape(q.shape)
        norms = np.frombuffer(self.queue.download(lse), np.float32).reshape(batch, heads, rows)
        return got.astype(np.float32), norms


def cache(
    queue: Any, variant: tuple[int, KiviSpec], tokens: int, start: list[int], *,
    heads: int = 2, sink: int = 0, dtype: str = "BF16", seed: int = 0, **settings: Any,
) -> DeviceCache:  # fmt: skip
    """Random tokens, none of them in the cache yet: keys with outlying channels, as models have."""
    head_dim, spec = variant
    random = np.random.default_rng(seed)
    shape = (len(start), heads, tokens, head_dim)
    k = random.standard_normal(shape) + 3 * random.standard_normal((1, heads, 1, head_dim))
    k, v = (x.astype(DTYPES[dtype]).astype(np.float32) for x in (k, random.standard_normal(shape)))
    starts = np.array(start, np.int32)
    return DeviceCache(replace(spec, sink=sink), dtype, k, v, starts, queue=queue, **settings)


def queries(found: Cache, heads: int, rows: int, seed: int = 1) -> Array:
    """BF16 numbers [B, heads, rows, D]."""
    shape = (found.batch, heads, rows, found.head_dim)
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES["BF16"]).astype(np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(DTYPES["BF16"]).astype(np.float32)


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: npt.NDArray[np.int32], **settings: Any) -> np.ndarray:
    """Attention as it is in BF16: values, weights and the result rounded; sums FP32.

    Keys are taken as they are: those of a plain cache are BF16 numbers, so its scores are exact but for their sums.
    """
    mask, sinks = settings.pop("mask", None), settings.pop("sinks", None)
    scaling, softcap = settings["scaling"], settings.get("softcap", 0.0)
    per_head = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    for b, first in enumerate(start):
        keys, values = (np.repeat(np.nan_to_num(x[b, :, first:]), per_head, 0) for x in (k, bf16(v)))
        scores = np.einsum("hqd,htd->hqt", q[b], keys).astype(np.float32) * np.float32(scaling)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        if mask is not None:
            scores = np.where(mask[b][..., first:], scores, -np.inf)
        extra = np.full(scores.shape[:-1], -np.inf) if sinks is None else np.tile(sinks[:, None], scores.shape[1])
        most = np.maximum(scores.max(-1, initial=-np.inf), extra)
        base = np.where(np.isinf(most), 0, most)
        p = np.exp(scores - base[..., None])
        total = p.sum(-1) + np.exp(extra - base)
        total = np.where(total == 0, 1, total)
        out[b] = np.einsum("hqt,htd->hqd", bf16(p), values) / total[..., None]
    return bf16(out)


def check(found: DeviceCache, q: Array, visible: int, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's results, after comparison: errors against FP64 are at most twice those of plain BF16."""
    out, lse = found.attend(q, visible, **settings)
    settings.pop("out_f32", None)
    slots = found.slots
    _, k, v, _ = found.reference()
    k, v = (
        np.concatenate([x, exact[:, :, slots:visible]], 2) for x, exact in ((k, found.k), (v, found.v))
    )  # fmt: skip
    exact, exact_lse = attention(
        q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), found.start, **settings
    )
    errors = [x - exact for x in (out, plain(q, k, v, found.start, **settings))]
    for what, of in (("mean", lambda x: np.sqrt(np.square(x).mean())), ("largest", lambda x: np.abs(x).max())):
        ours, theirs = map(of, errors)
        assert ours <= 2 * theirs + 1e-6, f"{what} error {ours:.2e}, of plain BF16 {theirs:.2e}"
    np.testing.assert_allclose(lse, exact_lse, atol=0.02, rtol=2**-8)
    assert not out[np.isneginf(exact_lse)].any()
    return out, lse
