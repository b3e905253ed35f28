"""Attention of some queries over a quantized cache, read as it lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bitforbit.cuda.kernel import F32, U32, U64, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.kv.call import ALIGNMENT, LARGEST_GRID, SEGMENT_TOKENS, TILE_TOKENS, Defines, KvCall
from bitforbit.cuda.queue import Queue
from bitforbit.errors import UsageError

QUERIES = 8
"""Of a block: columns of the matrix instruction."""
THREADS = 128
MERGE_THREADS = 256
WORKSPACE_LIMIT = 64 << 20
"""More queries than have room in so many bytes take several launches."""
LARGEST_SIZE = 1 << 31

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """Launches for so many queries over a cache."""

    segments: int
    """Items that are segments."""
    items: int
    """Parts that a row's tokens are cut into: segments, and what has 512 of the others."""
    groups: int
    """Of QUERIES queries of a head of the keys: all."""
    pass_groups: int
    """In one launch."""
    group_bytes: int
    """Of the partial results of one."""

    @property
    def workspace_bytes(self) -> int:
        """Of a launch's partial results."""
        return self.pass_groups * self.group_bytes


def plan(call: KvCall, visible: int, queries: int) -> Plan:
    """How so many queries of each head of the keys see so many slots. Rows with padding need less."""
    segments = -(-call.values_quantized(call.tokens) // SEGMENT_TOKENS)
    exact = min(visible, call.residual + visible - call.tokens)
    tiles = -(-call.sink // TILE_TOKENS) + (exact + TILE_TOKENS - 2) // TILE_TOKENS + 1
    items = segments + -(-tiles * TILE_TOKENS // SEGMENT_TOKENS)
    groups = -(-queries // QUERIES)
    group_bytes = 4 * items * call.batch * call.heads * QUERIES * (call.head_dim + 2)
    pass_groups = max(1, min(groups, WORKSPACE_LIMIT // group_bytes))
    return Plan(segments, items, groups, pass_groups, group_bytes)


def workspace_bytes(call: KvCall, visible: int, queries_per_head: int, query_rows: int) -> int:
    """Size of a workspace, whose contents matter to no one; launches one after the other may share it."""
    return plan(call, visible, queries_per_head * query_rows).workspace_bytes


@lru_cache(maxsize=256)
def kernels(defines: Defines) -> tuple[Kernel, Kernel]:
    """The binaries for settings: partial results, and what joins them."""
    attend = (
        *(Pointer,) * 6, *(U32,) * 6, Pointer, Pointer, *(U64,) * 3, *(U32,) * 3, F32, F32, Pointer, *(U64,) * 3, U32,
        Pointer, Pointer,
    )  # fmt: skip
    merge = (Pointer, *(U32,) * 5, Pointer, *(U32,) * 4, Pointer, U32, *(Pointer,) * 3, U32, Pointer)
    return Kernel("kv_attend", "kv_attend.cu", attend, defines), Kernel("kv_merge", "kv_merge.cu", merge, defines)


def attend(
    queue: Queue, call: KvCall, visible: int, q: int, q_strides: Strides, queries_per_head: int, query_rows: int,
    scaling: float, softcap: float, sinks: int, mask: int, mask_strides: Strides, out: int, out_f32: bool, lse: int,
    workspace: int,
) -> None:  # fmt: skip
    """Attend to the first ``visible`` slots. Only enqueues; the same bits in any batch, padding and other queries.

    ``q``: BF16 [B, Hq, query_rows, D], Hq = heads * queries_per_head, ``q_strides`` from row to row, head to head,
    query to query in elements, each query on 8 bytes. ``softcap`` 0: none. ``sinks``: float32 [Hq], logits that join
    the denominator, or 0. ``mask``: uint8 (0: not seen) by row, head of the queries, query and slot, strides of the
    first three in bytes, or 0. ``out``: [B, Hq, query_rows, D] without gaps, float32 or BF16; zeros where nothing is
    seen. ``lse``: float32 [B, Hq, query_rows], natural logarithms of the denominators, or 0. ``workspace``: see
    :func:`workspace_bytes`, on 16 bytes.

    With ``call.counter`` a captured launch is right for every number of slots up to ``call.tokens``; the mask then
    needs room for as many. Raises UsageError for what the kernels do not take.
    """
    call.check()
    if call.dtype != "BF16":
        raise UsageError(f"expected a BF16 cache, got {call.dtype}: use attend_torch")
    if q % 8 or any(stride % 4 for stride in q_strides) or out % (4 if out_f32 else 2) or workspace % ALIGNMENT:
        raise UsageError(
            f"expected queries on 8 bytes and a workspace on {ALIGNMENT}, got q {q:#x} with strides {q_strides}, "
            f"out {out:#x}, workspace {workspace:#x}: make them contiguous"
        )
    queries = queries_per_head * query_rows
    if queries == 0 or call.batch == 0:
        return
    chosen = plan(call, visible, queries)
    if visible < call.tokens or max(visible, queries) >= LARGEST_SIZE or chosen.items > LARGEST_GRID:
        raise UsageError(f"expected {call.tokens} slots or more, and fewer than 2^25, got {visible}; {queries} queries")
    parts, join = kernels(call.defines)
    norms = workspace + chosen.workspace_bytes // (call.head_dim + 2) * call.head_dim
    rows = call.batch * call.heads
    for first in range(0, chosen.groups, chosen.pass_groups):
        groups = min(chosen.pass_groups, chosen.groups - first)
        queue.launch(
            parts, LaunchConfig((groups, rows, chosen.items), (THREADS, 1, 1)), call.segments, call.window_k,
            call.window_v, call.sink_k, call.sink_v, call.start, call.heads, call.residual, call.sink, call.capacity,
            call.tokens, visible, call.counter, q, *q_strides, queries_per_head, query_rows, first, scaling,
            softcap, mask, *mask_strides, chosen.segments, workspace, norms,
        )  # fmt: skip
        queue.launch(
            join, LaunchConfig((groups * QUERIES, rows, 1), (MERGE_THREADS, 1, 1)), call.start, call.heads,
            call.residual, call.sink, call.tokens, visible, call.counter, queries_per_head, query_rows, first, groups,
            sinks, chosen.segments, workspace, norms, out, out_f32, lse,
        )  # fmt: skip
