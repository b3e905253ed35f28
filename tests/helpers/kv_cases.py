"""Quantized caches in numpy, element by element as bitforbit.kv.layout defines them, and their attention in FP64."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bitforbit.cpu import kv as native
from bitforbit.kv.layout import SEGMENT_TOKENS, KvLayout, key_position, value_position
from bitforbit.kv.spec import TILE_TOKENS, KiviSpec

DTYPES: dict[str, npt.DTypeLike] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
Array = npt.NDArray[np.float32]


def params_dtype(dtype: str) -> np.dtype:
    return np.dtype(np.float16 if dtype == "F16" else ml_dtypes.bfloat16)


def step(x: np.ndarray, up: bool) -> np.ndarray:
    """The next 16-bit number of its dtype above or below (x is neither zero nor infinite)."""
    bits = x.view(np.uint16)
    away = (bits & 0x8000 != 0) != up
    return np.where(away, bits + np.uint16(1), bits - np.uint16(1)).astype(np.uint16).view(x.dtype)


def round_to(x: Array, dtype: np.dtype, up: bool) -> np.ndarray:
    """x rounded up or down to a 16-bit dtype; past the largest finite numbers it stops there."""
    with np.errstate(over="ignore"):
        near = x.astype(dtype)
    near = np.where(np.isinf(near.astype(np.float32)), np.copysign(ml_dtypes.finfo(dtype).max, x).astype(dtype), near)
    value = near.astype(np.float32)
    wrong = ((value < x) if up else (value > x)) & (np.abs(value) != np.float32(ml_dtypes.finfo(dtype).max))
    # From zero the next number is the least subnormal one, of the sign of the direction.
    least = np.array(0x0001 if up else 0x8001, np.uint16).view(dtype)
    next_to = step(near, up)
    next_to = np.where(np.isinf(next_to.astype(np.float32)), near, next_to)
    return np.where(wrong & (value == 0), least, np.where(wrong, next_to, near)).astype(dtype)


def quantize(x: Array, bits: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups along the last axis: codes uint8, scales and zeros as bits of 16-bit numbers."""
    p, n = params_dtype(dtype), np.float32((1 << bits) - 1)
    with np.errstate(all="ignore"):
        finite = np.isfinite(x).all(-1)
        x = np.where(finite[..., None], x, np.float32(0))
        lo, hi = x.min(-1) + np.float32(0), x.max(-1)
        zero = round_to(lo, p, up=False)
        z = zero.astype(np.float32) + np.float32(0)
        zero = z.astype(p)
        span = (hi - z) / n
        span = np.where(np.isfinite(span), span, hi / n - z / n)
        least = np.float32(2.0**-24 if dtype == "F16" else 2.0**-126)
        scale = np.where(hi <= z, np.float32(0), np.maximum(round_to(span, p, up=True).astype(np.float32), least))
        codes = np.rint((x - z[..., None]) * (np.float32(1) / scale)[..., None])
        codes = np.where(scale[..., None] == 0, 0, np.clip(codes, 0, n)).astype(np.uint8)
    nan = np.uint16(0x7E00 if dtype == "F16" else 0x7FC0)
    scale_bits = np.where(finite, scale.astype(p).view(np.uint16), nan)
    zero_bits = np.where(finite, zero.view(np.uint16), nan)
    return np.where(finite[..., None], codes, 0).astype(np.uint8), scale_bits, zero_bits


def dequantize(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, dtype: str) -> Array:
    p = params_dtype(dtype)
    s, z = scale.view(p).astype(np.float32)[..., None], zero.view(p).astype(np.float32)[..., None]
    return z + s * codes.astype(np.float32)


@dataclass
class Cache:
    """Exact keys and values [B, H, T, D] as FP32 numbers of the dtype, the kernels' tensors, and the reference's."""

    spec: KiviSpec
    dtype: str
    k: Array
    v: Array
    start: npt.NDArray[np.int32]
    slots: int = 0
    threads: int = 1
    segments: list[np.ndarray] = field(default_factory=list)
    bad: int = 0

    def __post_init__(self) -> None:
        self.batch, self.heads, self.total, self.head_dim = self.k.shape
        self.layout = KvLayout(self.spec, self.head_dim)
        assert self.spec.residual is not None
        self.capacity = self.spec.residual + 1
        shape = (self.batch, self.heads, self.capacity, self.head_dim)
        self.window_k = np.full(shape, np.nan, DTYPES[self.dtype])
        self.window_v = self.window_k.copy()
        sink = (self.batch, self.heads, self.spec.sink, self.head_dim)
        self.sink_k, self.sink_v = (np.full(sink, np.nan, DTYPES[self.dtype]) for _ in range(2))

    def call(self) -> native.KvCall:
        s = self.spec
        assert s.residual is not None

        def at(array: np.ndarray) -> int:
            return int(array.__array_interface__["data"][0])

        return native.KvCall(
            self.batch, self.heads, self.head_dim, s.k_bits, s.v_bits, s.group, s.value_group, s.residual, s.sink,
            self.capacity, self.dtype, [at(x) for x in self.segments], at(self.window_k), at(self.window_v),
            at(self.sink_k), at(self.sink_v), at(self.start), self.slots,
        )  # fmt: skip

    def show(self, begin: int, end: int) -> None:
        """Slots come into the window, and into the sinks."""
        for slot in range(begin, end):
            for window, x in ((self.window_k, self.k), (self.window_v, self.v)):
                window[:, :, slot % self.capacity] = x[:, :, slot]
            for b in range(self.batch):
                token = slot - self.start[b]
                if 0 <= token < self.spec.sink:
                    self.sink_k[b, :, token], self.sink_v[b, :, token] = self.k[b, :, slot], self.v[b, :, slot]

    def grow(self, tokens: int) -> None:
        """A call of so many tokens: what leaves the window is quantized, and the tokens come into it."""
        end = self.slots + tokens
        while SEGMENT_TOKENS * len(self.segments) < end:
            self.segments.append(np.zeros((self.batch, self.heads, self.layout.record_bytes), np.uint8))
        if tokens == 1:
            self.show(self.slots, end)
            self.bad += native.flush(self.call(), 1, 0, 0, (0, 0, 0, 0, 0, 0), self.threads)
        else:
            # Strides of their own: keys [B, T, H, D] in memory, values [B, H, T + 3, D].
            pending_k = np.ascontiguousarray(
                self.k[:, :, self.slots : end].transpose(0, 2, 1, 3).astype(DTYPES[self.dtype])
            )
            pending_v = np.full((self.batch, self.heads, tokens + 3, self.head_dim), np.nan, DTYPES[self.dtype])
            pending_v[:, :, :tokens] = self.v[:, :, self.slots : end]
            h, d = self.heads, self.head_dim
            strides = (tokens * h * d, d, h * d, h * (tokens + 3) * d, (tokens + 3) * d, d)
            addresses = [int(x.__array_interface__["data"][0]) for x in (pending_k, pending_v)]
            self.bad += native.flush(self.call(), tokens, addresses[0], addresses[1], strides, self.threads)
            self.show(max(self.slots, end - self.capacity), end)
            for b in range(self.batch):  # the sinks of a long call
                for token in range(min(self.spec.sink, max(0, end - int(self.start[b])))):
                    slot = int(self.start[b]) + token
                    self.sink_k[b, :, token], self.sink_v[b, :, token] = self.k[b, :, slot], self.v[b, :, slot]
        self.slots = end

    def quantized(self, b: int) -> tuple[int, int, int]:
        """Tokens, quantized keys, quantized values of a row."""
        length = max(0, self.slots - int(self.start[b]))
        return length, self.spec.keys_quantized(length), self.spec.values_quantized(length)

    def reference(self) -> tuple[list[np.ndarray], Array, Array, int]:
        """Segments, dequantized keys and values [B, H, T, D] (exact where they are), and groups that are not finite."""
        segments = [np.zeros_like(x) for x in self.segments]
        k, v = self.k[:, :, : self.slots].copy(), self.v[:, :, : self.slots].copy()
        bad = 0
        s, d, lay = self.spec, self.head_dim, self.layout
        for b in range(self.batch):
            _, keys, values = self.quantized(b)
            base = int(self.start[b]) + s.sink
            for h in range(self.heads):
                records = [segment[b, h] for segment in segments]
                groups = self.k[b, h, base : base + keys].reshape(keys // s.group, s.group, d).transpose(0, 2, 1)
                codes, scale, zero = quantize(groups, s.k_bits, self.dtype)  # [n, D, G]
                bad += int((scale.view(params_dtype(self.dtype)) != scale.view(params_dtype(self.dtype))).sum())
                k[b, h, base : base + keys] = (
                    dequantize(codes, scale, zero, self.dtype).transpose(0, 2, 1).reshape(keys, d)
                )
                for n in range(len(codes)):
                    record, at = records[n * s.group // SEGMENT_TOKENS], n * s.group % SEGMENT_TOKENS
                    params = record[lay.key_params + at // s.group * lay.key_group_bytes :][: lay.key_group_bytes]
                    params.view(np.uint16)[:] = np.concatenate([scale[n], zero[n]])
                    for i in range(s.group):
                        tile = record[(at + i) // TILE_TOKENS * lay.key_tile_bytes :][: lay.key_tile_bytes]
                        self.put(tile.view(np.uint32), codes[n, :, i], *self.key_positions(i % TILE_TOKENS))
                groups = self.v[b, h, base : base + values].reshape(values, d // s.value_group, s.value_group)
                codes, scale, zero = quantize(groups, s.v_bits, self.dtype)  # [T, groups, v_group]
                bad += int((scale.view(params_dtype(self.dtype)) != scale.view(params_dtype(self.dtype))).sum())
                v[b, h, base : base + values] = dequantize(codes, scale, zero, self.dtype).reshape(values, d)
                for i in range(values):
                    record, at = records[i // SEGMENT_TOKENS], i % SEGMENT_TOKENS
                    tile, at = at // TILE_TOKENS, at % TILE_TOKENS
                    words = record[lay.value_codes + tile * lay.value_tile_bytes :][: lay.value_tile_bytes]
                    self.put(words.view(np.uint32), codes[i].reshape(-1), *self.value_positions(at))
                    size = lay.value_params_tile_bytes
                    params = record[lay.value_params + tile * size :][:size].view(np.uint16).reshape(-1, 2, TILE_TOKENS)
                    params[:, 0, at], params[:, 1, at] = scale[i], zero[i]
        return segments, k, v, bad

    def key_positions(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        words, shifts = zip(*(key_position(self.spec.k_bits, i, c) for c in range(self.head_dim)), strict=True)
        return np.array(words), np.array(shifts)

    def value_positions(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        at = (value_position(self.spec.v_bits, self.head_dim, i, c) for c in range(self.head_dim))
        words, shifts = zip(*at, strict=True)
        return np.array(words), np.array(shifts)

    @staticmethod
    def put(words: npt.NDArray[np.uint32], codes: np.ndarray, at: np.ndarray, shifts: np.ndarray) -> None:
        np.bitwise_or.at(words, at, codes.astype(np.uint32) << shifts.astype(np.uint32))

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
        """The kernel's output [B, Hq, Lq, D] as float32, and lse; q likewise, mask [B, 1 or Hq, Lq, visible]."""
        batch, heads, rows, d = q.shape
        x = np.full((batch, rows, heads, d), 0, DTYPES[self.dtype])  # strides of their own
        x[:] = q.transpose(0, 2, 1, 3)
        out = np.full((batch, heads, rows, d), 77, np.float32 if out_f32 else DTYPES[self.dtype])
        lse = np.full((batch, heads, rows), 77, np.float32)
        seen = None if mask is None else np.ascontiguousarray(mask.astype(np.uint8))
        strides = (
            (0, 0, 0)
            if seen is None
            else tuple(0 if n == 1 else s for n, s in zip(seen.shape[:3], seen.strides[:3], strict=True))
        )

        def at(array: np.ndarray | None) -> int:
            return 0 if array is None else int(array.__array_interface__["data"][0])

        native.attend(
            self.call(), visible, at(x), (rows * heads * d, d, heads * d), heads // self.heads, rows, scaling, softcap,
            at(sinks), at(seen), strides, at(out), out_f32, at(lse), self.threads,
        )  # fmt: skip
        return out.astype(np.float32), lse


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    start: npt.NDArray[np.int32],
    *,
    scaling: float,
    softcap: float = 0.0,
    sinks: Array | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in the dtype of q, k, v (FP64: the truth); slots before start[b] are not seen."""
    batch, heads, rows = q.shape[:3]
    repeat = heads // k.shape[1]
    k, v = np.repeat(k, repeat, 1), np.repeat(v, repeat, 1)
    seen = np.arange(k.shape[2])[None, :] >= start[:, None]
    seen = np.broadcast_to(seen[:, None, None, :], (batch, heads, rows, k.shape[2]))
    if mask is not None:
        seen = seen & mask
    with np.errstate(all="ignore"):
        scores = np.einsum("bhqd,bhtd->bhqt", q, np.nan_to_num(k)) * scaling
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(seen, scores, -np.inf)
        extra = (
            np.full((batch, heads, rows, 1), -np.inf)
            if sinks is None
            else np.broadcast_to(sinks.astype(q.dtype)[None, :, None, None], (batch, heads, rows, 1))
        )
        most = np.concatenate([scores, extra], -1).max(-1, keepdims=True)
        p = np.exp(scores - np.where(np.isinf(most), 0, most))
        total = p.sum(-1, keepdims=True) + np.exp(extra - np.where(np.isinf(most), 0, most))
        out = np.where(total > 0, np.einsum("bhqt,bhtd->bhqd", p, np.nan_to_num(v)) / total, 0)
        return out, (most + np.log(total))[..., 0]
