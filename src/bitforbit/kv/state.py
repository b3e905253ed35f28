"""One layer's cache in torch tensors: :mod:`bitforbit.kv.layout` says where everything is.

A call is ``append``, attention (:mod:`bitforbit.attention.quantized`), ``flush``. No call copies the packed part, and
none makes a copy of it in the model's dtype: a step writes one token into the window, and what leaves it is quantized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitforbit.errors import KvCacheError, KvSpecError
from bitforbit.kv import pack
from bitforbit.kv.layout import SEGMENT_TOKENS, KvLayout
from bitforbit.kv.naive import params_dtype
from bitforbit.kv.quantize import Watch, flush_tokens
from bitforbit.kv.spec import KiviSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KvState:
    """The cache of one layer for ``batch`` rows.

    ``slots`` counts the columns of the padded batch so far, ``start`` (int32 [B]) the padding on the left of each row.
    After an error in a call the cache is dead: everything but :meth:`reset` raises KvCacheError.
    """

    def __init__(
        self, spec: KiviSpec, batch: int, heads: int, head_dim: int, *,
        dtype: torch.dtype, device: torch.device | str, name: str = "",
    ) -> None:  # fmt: skip
        """``heads`` are key-value heads; ``name`` is for messages. Raises KvSpecError."""
        if dtype not in DTYPES:
            raise KvSpecError(f"expected a model in bfloat16, float16 or float32, got {dtype}")
        if spec.residual is not None:
            spec.check_head(head_dim)
        self.spec, self.heads, self.head_dim, self.dtype = spec, heads, head_dim, dtype
        self.device, self.name = torch.device(device), name
        self.layout = KvLayout(spec, head_dim)
        self.params = params_dtype(dtype)
        self._clear(batch)

    def _clear(self, batch: int) -> None:
        self.slots = 0
        self.flushed = 0
        """Slots that the quantized part and, but for a single new token, the window were made of."""
        self.failed = ""
        self.pending: tuple[Tensor, Tensor] | None = None
        """Keys and values of this call, if they are several."""
        self.segments: list[Tensor] = []
        self.watch = Watch(self.device)
        self.table: Tensor | None = None
        """Of kernels on a GPU: addresses of the segments, ``table_of``."""
        self.table_of: list[int] = []
        self.window_k = self._empty(batch, self.heads, 0, self.head_dim)
        self.window_v = self._empty(batch, self.heads, 0, self.head_dim)
        self.sink_k = self._zeros(batch, self.heads, self.spec.sink, self.head_dim)
        self.sink_v = self._zeros(batch, self.heads, self.spec.sink, self.head_dim)
        self.start = self._zeros(batch, dtype=torch.int32)
        self._starts: tuple[int, ...] | None = (0,) * batch
        self._padding = 0  # no row starts after this slot

    def reset(self) -> None:
        """Forget everything, an error too."""
        self._clear(self.batch)

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows."""
        return int(self.start.shape[0])

    @property
    def capacity(self) -> int:
        """Slots in the exact window."""
        return int(self.window_k.shape[2])

    @property
    def starts(self) -> tuple[int, ...]:
        """``start`` on the host. Waits for the device once after each change."""
        if self._starts is None:
            self._starts = tuple(self.start.tolist())
        return self._starts

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        exact = (self.window_k, self.window_v, self.sink_k, self.sink_v, self.start, *(self.pending or ()))
        return sum(tensor.nbytes for tensor in (*self.segments, *exact))

    # --- a call -----------------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor) -> None:
        """Count the tokens ``[B, H, q, D]``, of any strides, of a call.

        One token goes into the window, several are kept as ``pending`` until :meth:`flush`; without quantization all
        go into the window. Raises KvCacheError.
        """
        self._check_alive()
        expected = (self.batch, self.heads, k.shape[2] if k.dim() == 4 else -1, self.head_dim)
        if k.shape != expected or v.shape != expected or k.dtype != self.dtype or v.dtype != self.dtype:
            raise KvCacheError(
                f"{self._where}expected keys and values {list(expected)} in {self.dtype}, got {list(k.shape)} in "
                f"{k.dtype} and {list(v.shape)} in {v.dtype}; a cache is for one model and one batch, reset() it first"
            )
        k, v = k.detach(), v.detach()
        count = k.shape[2]
        if count > 1 and self.spec.residual is not None:
            self.pending = (k, v)
        elif count:
            self._store(self.slots, k, v)
        self.slots += count

    def set_padding(self, mask: Tensor | None) -> None:
        """Take the padding from a call's mask, bool (True: seen) or added, ``[B, 1 or Hq, q, slots]``.

        After ``append``. A row starts where its last query sees its first token; that of a row with tokens stays.
        """
        self._check_alive(within=True)
        if mask is None or self.flushed > self._padding or self.flushed > max(self.starts, default=0):
            return
        seen = mask[:, 0, -1, : self.slots]
        if seen.dtype is not torch.bool:
            seen = seen > torch.finfo(seen.dtype).min / 2
        unseen = (~seen).int().cummin(-1).values.sum(-1).to(self.start)
        self.start.copy_(torch.where(self.start < self.flushed, self.start, unseen.clamp_min(self.flushed)))
        self._starts, self._padding = None, self.slots

    def flush(self) -> None:
        """After attention: quantize what has left the exact window.

        Raises NonFiniteKeysError for NaN and infinity, on a GPU in a later call. The cache is dead then.
        """
        self._check_alive(within=True)
        old, new, pending = self.flushed, self.slots, self.pending
        try:
            self._grow(new)
            flush_tokens(self, old, new, pending)
            if pending is not None:
                self._store(old, *pending)
        except BaseException as error:
            self.failed = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.pending = None
        self.flushed = new

    def _store(self, first: int, k: Tensor, v: Tensor) -> None:
        """Write the tokens of slots ``first`` on into the window and, a row's first ones, among the sink tokens."""
        self._grow(first + k.shape[2])
        count = min(k.shape[2], self.capacity)
        last = first + k.shape[2]
        for begin, end in ring(last - count, last, self.capacity):
            place = begin % self.capacity
            for window, x in ((self.window_k, k), (self.window_v, v)):
                window[:, :, place : place + end - begin] = x[:, :, begin - first : end - first]
        if self.spec.sink and first < self._padding + self.spec.sink:
            self._store_sinks(first, k, v)

    def _store_sinks(self, first: int, k: Tensor, v: Tensor) -> None:
        sink, start = self.spec.sink, self.start.long()
        slot = start[:, None] + torch.arange(sink, device=self.device)  # [B, sink]
        new = ((slot >= first) & (slot < first + k.shape[2]))[:, None, :, None]
        index = (slot - first).clamp(0, k.shape[2] - 1)[:, None, :, None].expand(-1, self.heads, -1, self.head_dim)
        for kept, x in ((self.sink_k, k), (self.sink_v, v)):
            kept.copy_(torch.where(new, x.gather(2, index), kept))

    def _grow(self, slots: int) -> None:
        """Make room for slots in the window: until it is full size, slot x is at x."""
        full, old = self.spec.residual, self.capacity
        if slots <= old or (full is not None and old == full + 1):
            return
        new = max(slots, old + max(64, old // 4))
        new = new if full is None else min(full + 1, max(new, 2 * old))
        for name in ("window_k", "window_v"):
            window = getattr(self, name)
            grown = self._empty(self.batch, self.heads, new, self.head_dim)
            grown[:, :, :old] = window
            setattr(self, name, grown)

    def room_for(self, tokens: int) -> None:
        """Segments for so many quantized tokens per row."""
        while len(self.segments) * SEGMENT_TOKENS < tokens:
            self.segments.append(self._zeros(self.batch, self.heads, self.layout.record_bytes, dtype=torch.uint8))

    # --- reading ----------------------------------------------------------------------------------------------------

    def exact_keys(self) -> Tensor:
        """All keys of a cache without quantization, a view ``[B, H, slots, D]``. Raises KvCacheError for others."""
        return self._all(self.window_k)

    def exact_values(self) -> Tensor:
        """All values of a cache without quantization, a view ``[B, H, slots, D]``. Raises KvCacheError for others."""
        return self._all(self.window_v)

    def _all(self, window: Tensor) -> Tensor:
        if self.spec.residual is not None:
            raise KvCacheError(f"{self._where}expected a cache without quantization (residual=None), got {self.spec}")
        return window[:, :, : self.slots]

    def exact(self, kind: str, row: int, first: int, last: int) -> Tensor:
        """Exact keys (``kind`` "k") or values ("v") of a row, tokens ``first`` to ``last``: ``[H, last - first, D]``.

        They must be in the window or pending.
        """
        window = (self.window_k if kind == "k" else self.window_v)[row]
        begin, end = self.starts[row] + first, self.starts[row] + last
        if self.pending is None:
            parts = [window[:, a % self.capacity :][:, : b - a] for a, b in ring(begin, end, self.capacity)]
        else:
            middle = min(max(begin, self.flushed), end)
            parts = [window[:, a % self.capacity :][:, : b - a] for a, b in ring(begin, middle, self.capacity)]
            pending = self.pending["kv".index(kind)][row]
            parts.append(pending[:, middle - self.flushed : end - self.flushed])
        if not parts:
            return window[:, :0]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def quantized(self, kind: str, row: int, first: int, last: int) -> Tensor:
        """Quantized keys or values of a row, counted from token ``sink``: float32 ``[H, last - first, D]``."""
        read = pack.read_keys if kind == "k" else pack.read_values
        pieces = pack.split(first, last)
        parts = [read(self.segments[s][row], self.layout, a, b, self.params) for s, a, b in pieces]
        return torch.cat(parts, 1) if parts else self.window_k.new_zeros((self.heads, 0, self.head_dim)).float()

    def tokens(self, row: int, slots: int | None = None) -> int:
        """Tokens of a row among the first slots (all that were flushed)."""
        return max(0, (self.flushed if slots is None else slots) - self.starts[row])

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """All keys and values, float32 ``[B, H, slots, D]`` by slot, zeros for padding. For tests: it is large."""
        out = torch.zeros((2, self.batch, self.heads, self.slots, self.head_dim), device=self.device)
        for row, start in enumerate(self.starts):
            before, tokens = self.tokens(row), self.tokens(row, self.slots)
            if not tokens:
                continue
            quantized = (self.spec.keys_quantized(before), self.spec.values_quantized(before))
            for which, kind, sinks, count in zip((0, 1), "kv", (self.sink_k, self.sink_v), quantized, strict=True):
                sink = min(self.spec.sink, before)
                parts = [sinks[row][:, :sink], self.quantized(kind, row, 0, count)]
                parts.append(self.exact(kind, row, sink + count, tokens))
                out[which, row, :, start:] = torch.cat([part.float() for part in parts], 1)
        return out[0], out[1]

    # --- changes between calls --------------------------------------------------------------------------------------

    def crop(self, slots: int) -> None:
        """Forget all but the first slots; what comes back into the exact window is what its codes say.

        Before ``flush`` too: the call's last tokens then leave no trace. Raises KvCacheError for a negative number.
        """
        self._check_alive(within=True)
        if slots < 0:
            raise KvCacheError(f"{self._where}expected 0 or more slots to keep, got {slots}")
        if slots >= self.slots:
            return
        if slots == 0:
            self.reset()
            return
        kept = max(0, slots - self.flushed)
        if self.pending is not None:
            self.pending = (self.pending[0][:, :, :kept], self.pending[1][:, :, :kept]) if kept else None
        self.slots = max(slots, self.flushed)
        self._crop_flushed(slots)
        self.start.clamp_(max=slots)
        self._starts, self._padding = None, min(self._padding, slots)

    def _crop_flushed(self, slots: int) -> None:
        if slots >= self.flushed:
            return
        if self.spec.residual is not None and self.flushed >= self.spec.sink + self.spec.residual:
            for row in range(self.batch):
                self._crop_row(row, self.tokens(row), self.tokens(row, slots))
            last = self.spec.keys_quantized(slots)
            del self.segments[-(-last // SEGMENT_TOKENS) :]
        self.slots = self.flushed = slots

    def _crop_row(self, row: int, old: int, new: int) -> None:
        start, sink = self.starts[row], self.spec.sink
        for kind, window, quantized, clear in (
            ("k", self.window_k, self.spec.keys_quantized, pack.clear_keys),
            ("v", self.window_v, self.spec.values_quantized, pack.clear_values),
        ):
            first, last = quantized(new), min(quantized(old), max(0, new - sink))
            if first < last:
                x = self.quantized(kind, row, first, last).to(self.dtype)
                slot = start + sink + first
                for begin, end in ring(slot, slot + last - first, self.capacity):
                    place = begin % self.capacity
                    window[row, :, place : place + end - begin] = x[:, begin - slot : end - slot]
            for segment, begin, _ in pack.split(first, quantized(old)):
                clear(self.segments[segment][row], self.layout, begin)

    def reorder(self, index: Tensor) -> None:
        """Rows ``index`` in place of all rows, as beam search does; the number of rows may change."""
        self._check_alive()
        index = index.to(self.device)
        with torch.inference_mode(False):
            for number, segment in enumerate(self.segments):  # one at a time
                self.segments[number] = segment.index_select(0, index)
            for name in ("window_k", "window_v", "sink_k", "sink_v", "start"):
                setattr(self, name, getattr(self, name).index_select(0, index))
        self._starts = None

    def repeat(self, times: int) -> None:
        """Every row so many times, one copy after the other."""
        self.reorder(torch.arange(self.batch).repeat_interleave(times))

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Some of the rows, by number or as a bool mask."""
        index = torch.as_tensor(rows)
        self.reorder(index.nonzero().flatten() if index.dtype is torch.bool else index)

    def to(self, device: torch.device | str) -> None:
        """Move everything to another device, a tensor at a time."""
        self._check_alive()
        device = torch.device(device)
        with torch.inference_mode(False):
            for number, segment in enumerate(self.segments):
                self.segments[number] = segment.to(device)
            for name in ("window_k", "window_v", "sink_k", "sink_v", "start"):
                setattr(self, name, getattr(self, name).to(device))
        self.device, self.watch, self.table = device, Watch(device), None

    # --- small things -----------------------------------------------------------------------------------------------

    @property
    def _where(self) -> str:
        return f"{self.name}: " if self.name else ""

    def _check_alive(self, within: bool = False) -> None:
        if self.failed:
            raise KvCacheError(
                f"{self._where}expected a cache that is whole, got one that an error ended ({self.failed}); "
                "reset() it, or begin a new one"
            )
        if not within and self.slots != self.flushed:
            raise KvCacheError(
                f"{self._where}expected flush() after the last {self.slots - self.flushed} tokens' attention, got "
                "another change; does the model use the attention function of this cache?"
            )

    def _empty(self, *shape: int) -> Tensor:
        with torch.inference_mode(False):  # written to outside of inference mode too
            return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)


def ring(first: int, last: int, capacity: int) -> list[tuple[int, int]]:
    """Slots ``first`` to ``last`` in pieces that are one after the other in a window; at most two."""
    if first >= last:
        return []
    seam = (first // capacity + 1) * capacity
    return [(first, last)] if last <= seam else [(first, seam), (seam, last)]
