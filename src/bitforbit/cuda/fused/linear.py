"""Products of one x with one or several matrices in tiles, in one launch that decodes them on its way."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused.order import Order, choose_order
from bitforbit.cuda.fused.plan import MMA_TOKENS, PLAIN, Variant
from bitforbit.cuda.kernel import DeviceProperties, LaunchConfig
from bitforbit.cuda.queue import Buffer, Queue
from bitforbit.cuda.tiles.decode import Parts, check_parts
from bitforbit.cuda.tiles.kinds import BF16, Kind
from bitforbit.cuda.tiles.layout import ALIGNMENT, TILE_ROWS, TileLayout
from bitforbit.errors import UsageError

KERNELS = plans.KERNELS
BIAS_TYPES = ("BF16", "F16", "F32")
"""Of a bias: as numbers in the table (kernels/fused.cuh)."""


@dataclass(frozen=True)
class Group:
    """Matrices [rows[i], order.cols] that are multiplied by the same x, made once with :func:`prepare`."""

    rows: tuple[int, ...]
    order: Order
    table: Buffer
    """In device memory: their addresses."""
    kind: Kind = BF16


def prepare(
    queue: Queue,
    matrices: Sequence[tuple[Parts, TileLayout, int]],
    splits: int | None = None,
    bias_types: Sequence[str] | None = None,
) -> Group:
    """A group of matrices: parts (as for ``tiles.decode``), layout, address of the bias ([rows]; 0: none) of each.

    ``bias_types``: what the biases are, of BIAS_TYPES; by default what outputs are. Matrices are of one kind.

    Parts and biases must stay where they are. ``splits`` gives another order of summation than the device's own; it
    changes the bits of the results. Raises CorruptTensorError for parts of wrong lengths, UsageError for
    wrong alignments, sizes and different numbers of columns.
    """
    if not matrices or len({(layout.cols, layout.kind) for _, layout, _ in matrices}) != 1:
        raise UsageError(
            "expected matrices of one number of columns and one kind, got "
            f"{[(layout.rows, layout.cols, layout.kind.name) for _, layout, _ in matrices]}: group those that share "
            "their input"
        )
    kind = matrices[0][1].kind
    bias_types = bias_types or [kind.outputs] * len(matrices)
    table, before = b"", 0
    for (parts, layout, bias), bias_type in zip(matrices, bias_types, strict=True):
        layout.check_size()
        check_parts(parts, layout, 0)
        if bias % (4 if bias_type == "F32" else 2):
            raise UsageError(f"expected an address of the bias on its elements' size, {bias_type}, got {bias:#x}")
        (tiles, _), (escapes, escapes_bytes), (offsets, _), (header, _) = parts
        table += struct.pack(
            "<6Q2IQ", tiles, escapes, escapes_bytes, offsets, header, bias, layout.rows, BIAS_TYPES.index(bias_type),
            before,
        )  # fmt: skip
        before += layout.rows
    rows, cols = tuple(layout.rows for _, layout, _ in matrices), matrices[0][1].cols
    order = choose_order(rows, cols, queue.properties) if splits is None else Order(cols, splits)
    return Group(rows, order, queue.upload(table), kind)


def workspace_bytes(group: Group, properties: DeviceProperties) -> int:
    """Size of a workspace for any number of tokens. All zeros at first; launches one after the other may share one."""
    return plans.workspace_bytes(group.rows, group.order, properties)


def linear(
    queue: Queue, group: Group, x: int, tokens: int, out: int, workspace: int, variant: Variant | None = None,
    order: Order | None = None,
) -> None:  # fmt: skip
    """Multiply x [tokens, cols] by the matrices of a group. Only enqueues.

    x and ``out`` are FP16 for weights of FP16, else BF16. ``out``: [tokens, rows[0]], then [tokens, rows[1]] and so on,
    one after the other. ``workspace``: address of :func:`workspace_bytes` bytes, a multiple of 16; zeros before its
    first use. ``variant`` is for measurements: all of one ``instruction`` give the same bits, and only those of the
    order's give the order's. ``order`` is another than the group's (its workspace is another, too). Raises UsageError
    for more than 64 tokens, and for a variant that the device cannot run.
    """
    if tokens == 0:
        return
    if x % 2 or out % 2 or workspace % ALIGNMENT:
        raise UsageError(
            f"expected even addresses of x and output, and a workspace on {ALIGNMENT} bytes, "
            f"got {x:#x}, {out:#x}, {workspace:#x}"
        )
    order = order or group.order
    if order.cols != group.order.cols:
        raise UsageError(f"expected an order of {group.order.cols} columns, got one of {order.cols}")
    plan = plans.plan(group.rows, order, tokens, queue.properties, variant, group.kind)
    queue.launch(
        plan.kernel, plan.config, group.table.address, len(group.rows), x, out, tokens, order.cols, order.splits,
        order.split_tiles, order.rules, workspace, workspace + plans.ARRIVED_BYTES,
    )  # fmt: skip


def plain(
    queue: Queue, weights: int, rows: int, order: Order, bias: int, x: int, tokens: int, out: int,
    outputs: str = "BF16", bias_type: str | None = None,
) -> None:  # fmt: skip
    """The same sums from weights as they are, [rows, cols]: slow, for comparisons bit by bit. Only enqueues.

    Weights, x and ``out`` are all BF16 or all FP16, as ``outputs`` says.
    """
    config = LaunchConfig((-(-rows // TILE_ROWS), -(-tokens // MMA_TOKENS), 1), (32, 1, 1))
    queue.launch(
        PLAIN[outputs], config, weights, bias, x, out, rows, order.cols, tokens, order.splits, order.split_tiles,
        order.rules, BIAS_TYPES.index(bias_type or outputs),
    )  # fmt: skip
