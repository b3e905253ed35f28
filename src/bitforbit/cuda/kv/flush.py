"""Packs what has left the exact window."""

from __future__ import annotations

from functools import lru_cache

from bitforbit.cuda.kernel import U32, U64, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.kv.call import ALIGNMENT, TILE_TOKENS, Defines, KvCall
from bitforbit.cuda.queue import Queue
from bitforbit.errors import UsageError

DTYPES = {"BF16": 0, "F16": 1, "F32": 2}
THREADS = 128
Strides = tuple[int, int, int, int, int, int]
"""Of pending keys, then values: from row to row, head to head, token to token, in elements."""


@lru_cache(maxsize=256)
def kernel(defines: Defines, dtype: str) -> Kernel:
    """The binary for settings. Raises UsageError for an unknown dtype."""
    if dtype not in DTYPES:
        raise UsageError(f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    parameters = (*(Pointer,) * 4, *(U32,) * 6, *(Pointer,) * 3, *(U64,) * 6, Pointer, U32)
    return Kernel("kv_flush", "kv_flush.cu", parameters, (*defines, ("BITFORBIT_DTYPE", str(DTYPES[dtype]))))


def flush(
    queue: Queue, call: KvCall, new_tokens: int, bad: int, pending_k: int = 0, pending_v: int = 0,
    pending_strides: Strides = (0, 0, 0, 0, 0, 0),
) -> None:  # fmt: skip
    """Quantize keys and values that leave the window as the cache grows from ``call.tokens`` to ``new_tokens`` slots.

    Only enqueues. New slots' keys and values are in ``pending`` [B, H, new, D] (an element's stride is 1), or, without
    it, in the window. ``bad``: address of a uint32, to which the number of groups with a NaN or an infinity is added.
    In a captured graph with ``call.counter`` the launch packs as many new slots each time. Raises UsageError for
    addresses, strides and sizes that the kernel does not take.
    """
    call.check()
    new = new_tokens - call.tokens
    if new <= 0:
        return
    size = 4 if call.dtype == "F32" else 2
    if (pending_k or pending_v) and any(
        (size * number) % ALIGNMENT for number in (pending_k // size, pending_v // size, *pending_strides)
    ):
        raise UsageError(
            f"expected pending keys and values whose tokens begin on {ALIGNMENT} bytes, got {pending_k:#x}, "
            f"{pending_v:#x} with strides {pending_strides}: make them contiguous"
        )
    groups = -(-new // call.residual) * (call.residual // call.group)
    tiles = (new - 1) // TILE_TOKENS + 2 if new > 1 else 1
    if call.counter == 0:  # rows without padding have the most
        groups = min(groups, call.keys_quantized(new_tokens) // call.group)
        tiles = min(tiles, -(-call.values_quantized(new_tokens) // TILE_TOKENS))
    key_blocks = -(-groups * (call.head_dim // 4) // THREADS)
    if key_blocks + tiles == 0:
        return
    config = LaunchConfig((key_blocks + tiles, call.batch * call.heads, 1), (THREADS, 1, 1))
    queue.launch(
        kernel(call.defines, call.dtype), config, call.segments, call.window_k, call.window_v, call.start, call.heads,
        call.residual, call.sink, call.capacity, call.tokens, new_tokens, call.counter, pending_k, pending_v,
        *pending_strides, bad, key_blocks,
    )  # fmt: skip
