"""Runs products straight from tiles (:mod:`bitforbit.cuda.fused`): their tables in device memory and their workspaces.

A kernel finds its matrices through a table of their addresses, which is uploaded once and lives as long as the first
matrix does: it is the same for every call, and for graphs that were captured. Within a capture nothing can be uploaded,
so a product has to run once before.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bitforbit.cuda.fused import linear as kernels
from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused.linear import Group
from bitforbit.cuda.fused.order import Order, choose_order
from bitforbit.cuda.fused.plan import ARRIVED_BYTES, MAX_TOKENS
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles import kinds
from bitforbit.cuda.tiles.layout import ALIGNMENT, PARTS, TileLayout
from bitforbit.errors import CorruptTensorError, UsageError
from bitforbit.ops import stats
from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu import queues, runtime
from bitforbit.ops.gpu.queues import TensorQueue, addresses
from bitforbit.ops.gpu.runtime import Place
from bitforbit.ops.gpu.weights import checked_parts
from bitforbit.ops.schema import TILES_DTYPES

__all__ = ["MAX_TOKENS", "Matrix", "clear", "linears", "order_of", "prepare"]


_BIAS_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Matrix(NamedTuple):
    """A matrix in tiles, to be multiplied."""

    parts: Parts
    rows: int
    bias: torch.Tensor | None
    """In BF16, FP16 or FP32."""
    kind: str = "BF16"


def order_of(group: Sequence[int], cols: int, properties: DeviceProperties) -> Order:
    """The order in which products with the matrices of a group, of so many rows each, sum on a device."""
    return choose_order(tuple(group), cols, properties)


def linears(
    x: torch.Tensor, matrices: Sequence[Matrix], cols: int, group: tuple[int, ...],
    order: Order | None = None, way: str = "fused",
) -> list[torch.Tensor]:  # fmt: skip
    """``x @ weight.T + bias`` of each matrix, ``[..., rows]``, for at most 64 tokens in all, side by side in memory.

    ``group`` are the rows of the matrices whose common order of summation is used; empty: these. ``order`` is another
    one, in its place; ``way`` is what the products are counted as (:mod:`bitforbit.ops.stats`). Raises UsageError, also
    within a graph capture if the same matrices were not multiplied before; CorruptTensorError.
    """
    device = matrices[0].parts[0].device
    kind = kinds.of(matrices[0].kind)
    runtime.check_input(x, cols, TILES_DTYPES[kind.outputs], device)
    runtime.checked_status(device)
    place, tokens = runtime.current_place(device), x.numel() // cols
    runtime.pass_by(place, None if order is None else matrices[0].parts)
    queue = queues.queue_at(device, place.stream)
    prepared = _prepared(queue, matrices, cols, group, place.capture == 0)
    if prepared is None:
        raise UsageError(
            "expected a fused product that is captured in a CUDA graph to have run before, so that what it keeps in "
            f"GPU memory is there, got the first one of {[m.rows for m in matrices]} x {cols}; run the model once, "
            "then capture"
        )
    x = x.detach().contiguous()
    rows = [matrix.rows for matrix in matrices]
    shapes = [(*x.shape[:-1], count) for count in rows]
    out = torch.empty(shapes[0] if len(rows) == 1 else tokens * sum(rows), dtype=x.dtype, device=device)
    if tokens:
        order = order or prepared.group.order
        workspace = _workspace(place, plans.workspace_bytes(prepared.group.rows, order, queue.properties))
        kernels.linear(queue, prepared.group, x.data_ptr(), tokens, out.data_ptr(), workspace.data_ptr(), None, order)
    for count in rows:
        stats.count(way, kind.item_bytes * count * cols)
    if len(rows) == 1:
        return [out]
    # As .data, they are no views to torch: each may be written to without the others' being said to have changed.
    pieces = out.split([tokens * count for count in rows])
    return [piece.view(shape).data for piece, shape in zip(pieces, shapes, strict=True)]


def prepare(matrices: Sequence[Matrix], cols: int, group: tuple[int, ...]) -> bool:
    """Make ready what :func:`linears` needs for these matrices; False within a graph capture, if it is not ready.

    Raises UsageError, CorruptTensorError.
    """
    device = matrices[0].parts[0].device
    may_upload = runtime.current_place(device).capture == 0
    return _prepared(queues.queue_for(device), matrices, cols, group, may_upload) is not None


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    group: Group
    storage: StorageWeakRef
    """Of the first matrix: while it exists, so does the table."""
    copies: tuple[torch.Tensor, ...] = ()
    """Of parts and biases that kernels cannot take where they are."""


_tables: dict[tuple[Any, ...], _Prepared] = {}
"""By all that a table says: an entry is right whatever becomes of the tensors that it was made for."""
_lock = threading.Lock()
_SWEEP_AT = 1024
_sweep_at = [_SWEEP_AT]


def _prepared(
    queue: TensorQueue, matrices: Sequence[Matrix], cols: int, group: tuple[int, ...], may_upload: bool
) -> _Prepared | None:
    key: tuple[Any, ...] = (queue.device, queue.properties, cols, group, matrices[0].kind)
    for (a, b, c, d), rows, bias, _ in matrices:
        key += (
            a.data_ptr(),
            a.numel(),
            b.data_ptr(),
            b.numel(),
            c.data_ptr(),
            c.numel(),
            d.data_ptr(),
            d.numel(),
            rows,
        )
        key += (None, None, None) if bias is None else (bias.data_ptr(), bias.shape, bias.dtype)
    found = _tables.get(key)
    if found is not None:
        return found
    if not may_upload:
        return None
    made = _make(queue, matrices, cols, group or tuple(m.rows for m in matrices))
    if not made.copies:  # of copies, nobody would notice when the tensors change
        with _lock:
            _sweep()
            _tables[key] = made
    return made


def _make(queue: TensorQueue, matrices: Sequence[Matrix], cols: int, group: tuple[int, ...]) -> _Prepared:
    for matrix in matrices:
        if min(matrix.rows, cols) < 1:
            raise CorruptTensorError(f"expected at least one row and one column, got {matrix.rows} and {cols}")
    copies: list[torch.Tensor] = []
    described, bias_types = [], []
    for matrix in matrices:
        parts, bias = checked_parts(PARTS, matrix.parts, ALIGNMENT), _bias(matrix, queue.device)
        if parts is not matrix.parts:
            copies += parts
        if bias is not None and bias is not matrix.bias:
            copies.append(bias)
        at = 0 if bias is None else bias.data_ptr()
        described.append((addresses(parts), TileLayout(matrix.rows, cols, kinds.of(matrix.kind)), at))
        bias_types.append("BF16" if bias is None else _BIAS_TYPES[bias.dtype])
    order = order_of(group, cols, queue.properties)

    def upload() -> Group:
        made = kernels.prepare(queues.queue_for(queue.device), described, order.splits, bias_types)
        return replace(made, order=order)

    storage = StorageWeakRef(matrices[0].parts[0].untyped_storage())
    if not queues.in_graph_tree(queue.device):
        return _Prepared(upload(), storage, tuple(copies))
    # Memory that is to stay must not come from inductor's pool; what another thread allocates does not.
    with ThreadPoolExecutor(1) as thread:
        return _Prepared(thread.submit(upload).result(), storage, tuple(copies))


def _bias(matrix: Matrix, device: torch.device) -> torch.Tensor | None:
    bias = matrix.bias
    if bias is None:
        return None
    if bias.dtype not in _BIAS_TYPES or bias.shape != (matrix.rows,) or bias.device != device:
        raise UsageError(
            f"expected a bias in BF16, FP16 or FP32 of shape ({matrix.rows},) on {device}, got {bias.dtype} and "
            f"{tuple(bias.shape)} on {bias.device}; cast it, or use mode exact"
        )
    return bias if bias.is_contiguous() else bias.detach().contiguous()


def _sweep() -> None:
    if len(_tables) < _sweep_at[0]:
        return
    for key, entry in list(_tables.items()):
        if entry.storage.expired():
            del _tables[key]
    _sweep_at[0] = max(_SWEEP_AT, 2 * len(_tables))


# --- workspaces -----------------------------------------------------------------------------------------------------


class _Local(threading.local):
    """Workspaces of one thread by device and stream, with the capture that they belong to."""

    def __init__(self) -> None:
        self.workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}
        self.captured: dict[tuple[torch.device, int], tuple[int, torch.Tensor]] = {}


_local = _Local()


def clear() -> None:
    """Free those of this thread."""
    _local.workspaces.clear()
    _local.captured.clear()


def _workspace(place: Place, nbytes: int) -> torch.Tensor:
    """At least so many bytes, the first of them zeros between launches.

    Those of a graph capture come from its pool and are filled with zeros at the beginning of every replay.
    """
    key = (place.device, place.stream)
    if queues.in_graph_tree(place.device):
        return _zeroed(nbytes, place.device)  # nothing of inductor's pool may be kept
    if place.capture:
        capture, memory = _local.captured.get(key, (0, None))
        if memory is None or capture != place.capture or memory.numel() < nbytes:
            memory = _zeroed(nbytes, place.device)
            _local.captured[key] = place.capture, memory
        return memory
    memory = _local.workspaces.get(key)
    if memory is None or memory.numel() < nbytes:
        memory = _local.workspaces[key] = _zeroed(nbytes, place.device)
    return memory


def _zeroed(nbytes: int, device: torch.device) -> torch.Tensor:
    memory = queues.empty_bytes(nbytes, device)
    memory[:ARRIVED_BYTES].zero_()  # the sums after them are written before they are read
    return memory
