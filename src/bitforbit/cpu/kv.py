"""Quantized key-value caches on the CPU: what leaves the exact window is packed, attention reads it packed.

Arrays are addresses: tensors belong to the caller, who keeps them alive and contiguous as bitforbit.kv.layout says.
The bytes that :func:`flush` writes are the same on every instruction set. :func:`attend` is flash decoding: FP32 sums,
parts of 512 tokens merged in order; a result depends on its own row only, not on the batch or the number of threads.
Models in bfloat16 with 2 or 4 bits use the CPU's BF16 products where it has them (scales folded into the queries and
probabilities; keys or values beyond about 1e34 overflow there); else every element is dequantized to float32 in
registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitforbit.cpu import _native
from bitforbit.cpu.isa import active
from bitforbit.errors import KvCacheError

_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_BITS = (2, 4, 8)

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class KvCall:
    """One layer's cache as it is before a call (bitforbit.kv.layout): counts, and addresses of its tensors.

    ``residual`` is in tokens, 0 where nothing is quantized; ``capacity`` in slots. ``segments`` are [batch, heads,
    record] bytes each; ``window_*`` [batch, heads, capacity, head_dim]; ``sink_*`` [batch, heads, sink, head_dim];
    ``start`` int32 [batch]. ``tokens`` is the number of slots that the quantized part was made of.
    """

    batch: int
    heads: int
    head_dim: int
    k_bits: int
    v_bits: int
    group: int
    v_group: int
    residual: int
    sink: int
    capacity: int
    dtype: str
    segments: Sequence[int]
    window_k: int
    window_v: int
    sink_k: int
    sink_v: int
    start: int
    tokens: int

    def check(self) -> None:
        """Raise KvCacheError for sizes that have no kernel."""
        if self.dtype not in _ITEM_BYTES:
            raise KvCacheError(f"expected a cache in BF16, F16 or F32, got {self.dtype!r}")
        if self.k_bits not in _BITS or self.v_bits not in _BITS:
            raise KvCacheError(f"expected 2, 4 or 8 bits, got {self.k_bits} for keys and {self.v_bits} for values")
        if self.head_dim % 16 or not 16 <= self.head_dim <= 512:
            raise KvCacheError(f"expected a head dimension that is a multiple of 16 up to 512, got {self.head_dim}")
        if self.group not in (32, 64, 128) or self.residual % self.group:
            raise KvCacheError(
                f"expected groups of 32, 64 or 128 keys that divide the window, got {self.group} and {self.residual}"
            )
        if self.v_group not in (16, 32, 64, 128) or self.head_dim % self.v_group:
            raise KvCacheError(
                f"expected groups of 16, 32, 64 or 128 channels that divide the head dimension, got {self.v_group} and "
                f"{self.head_dim}"
            )
        if min(self.batch, self.heads, self.capacity) < 1 or min(self.residual, self.sink, self.tokens) < 0:
            raise KvCacheError(f"expected sizes that are not negative and a window, got {self}")

    def native(self) -> _native.KvCache:
        """The same for the native library."""
        self.check()
        return _native.KvCache(
            self.dtype,
            (self.k_bits, self.v_bits),
            self.head_dim,
            (self.group, self.v_group),
            (self.batch, self.heads),
            (self.residual, self.sink, self.capacity),
            list(self.segments),
            (self.window_k, self.window_v, self.sink_k, self.sink_v, self.start),
            self.tokens,
        )


def implementation(dtype: str) -> str:
    """Name of the instruction set that a cache of this dtype would use now."""
    return _native.kv_implementation(active(), dtype)


def flush(
    call: KvCall,
    new_tokens: int,
    pending_k: int,
    pending_v: int,
    pending_strides: tuple[int, int, int, int, int, int],
    threads: int,
) -> int:
    """Quantize what leaves the window when ``new_tokens`` slots join ``call.tokens``: of every row keys
    [keys_quantized(L_old), keys_quantized(L_new)) and values likewise (bitforbit.kv.spec).

    Slots from ``call.tokens`` on are read from ``pending_*`` [batch, heads, new_tokens, head_dim], whose first three
    strides are in elements, keys' before values'; with 0 for both addresses they are in the window too. Returns the
    number of groups that hold a NaN or an infinity; their scales and zeros are NaN. Raises KvCacheError if the
    segments have no room.
    """
    if new_tokens < 0 or bool(pending_k) != bool(pending_v):
        raise KvCacheError(f"expected new tokens, pending as keys and values or neither, got {new_tokens}")
    try:
        return _native.kv_flush(
            call.native(),
            new_tokens,
            pending_k,
            pending_v,
            pending_strides[:3],
            pending_strides[3:],
            active(),
            threads,
        )
    except ValueError as error:
        raise KvCacheError(str(error)) from None


def attend(
    call: KvCall,
    visible: int,
    q: int,
    q_strides: Strides,
    queries_per_head: int,
    query_rows: int,
    scaling: float,
    softcap: float,
    sinks: int,
    mask: int,
    mask_strides: Strides,
    out: int,
    out_f32: bool,
    lse: int,
    threads: int,
) -> None:
    """Attention of ``q`` over the first ``visible`` slots, of which those from ``call.tokens`` on are in the window.

    ``q`` is [batch, heads * queries_per_head, query_rows, head_dim] in the cache's dtype, strides in elements (the
    last one 1). ``softcap`` 0: none. ``sinks``: float32 [heads * queries_per_head] logits that join the denominator,
    or 0. ``mask``: bytes [batch, heads * queries_per_head, query_rows, visible] with 1 for what is seen, strides in
    bytes (the last one 1; 0 where shared), or 0. ``out`` is contiguous and like ``q``, in float32 if ``out_f32``;
    ``lse`` float32 [batch, heads * queries_per_head, query_rows] gets the logarithm of the denominator, or 0. A query
    that sees nothing gives zeros and -infinity. Raises KvCacheError if segments or window do not hold all tokens.
    """
    if visible < call.tokens or queries_per_head < 1 or query_rows < 1:
        raise KvCacheError(
            f"expected at least the {call.tokens} slots of the cache to be visible and at least one query, got "
            f"{visible} slots and {queries_per_head} x {query_rows} queries"
        )
    try:
        _native.kv_attend(
            call.native(), visible, q, q_strides, queries_per_head, query_rows, scaling, softcap, sinks, mask,
            mask_strides, out, out_f32, lse, active(), threads,
        )  # fmt: skip
    except ValueError as error:
        raise KvCacheError(str(error)) from None
