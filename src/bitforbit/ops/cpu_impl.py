"""The operators on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from bitforbit.codecs.planes.layout import BLOCK_ROWS
from bitforbit.cpu import linear as products
from bitforbit.cpu import planes
from bitforbit.errors import UsageError
from bitforbit.ops import checks, exact, proven, stats
from bitforbit.ops.schema import LIBRARY, MODES
from bitforbit.ops.scratch import SCRATCH

Weight = tuple[str, int, int, int, torch.dtype]
"""Kind, rows, cols, rows per table and dtype."""

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def register() -> None:
    """Register the kernels; once per process."""
    LIBRARY.impl("decode", decode, "CPU")
    LIBRARY.impl("embedding", embedding, "CPU")
    LIBRARY.impl("linear", linear, "CPU")


def decode(
    code: torch.Tensor,
    digits: torch.Tensor,
    sign_mantissa: torch.Tensor,
    tails: torch.Tensor,
    kind: str,
    rows: int,
    cols: int,
    rows_per_table: int,
    dtype: torch.dtype,
    begin: int,
    end: int,
) -> torch.Tensor:
    """Rows [begin, end) of a weight, ``[end - begin, cols]``. Raises UsageError, CorruptTensorError."""
    checks.layout(kind, rows, cols, rows_per_table, dtype)
    if not 0 <= begin <= end <= rows:
        raise UsageError(f"expected a range of rows within 0 to {rows}, got {begin} to {end}")
    out = checks.empty((end - begin, cols), dtype)
    parts = (code, digits, sign_mantissa, tails)
    _decode(parts, (kind, rows, cols, rows_per_table, dtype), begin, end, checks.flat_bytes(out))
    return out


def decode_into(out: torch.Tensor, parts: checks.Parts, weight: Weight, begin: int) -> None:
    """Decode rows from ``begin`` on into a contiguous tensor ``[rows, cols]``; no operator, so nothing can trace it.

    Raises UsageError, CorruptTensorError.
    """
    _kind, rows, cols, _rows_per_table, dtype = weight
    end = begin + len(out)
    if out.dtype != dtype or out.shape[1:] != (cols,) or not out.is_contiguous() or not 0 <= begin <= end <= rows:
        raise UsageError(
            f"expected a contiguous {dtype} tensor for rows within 0 to {rows} of {cols} columns, got {out.dtype} of "
            f"shape {tuple(out.shape)} for rows {begin} to {end}"
        )
    _decode(parts, weight, begin, end, checks.flat_bytes(out))


def embedding(
    ids: torch.Tensor,
    code: torch.Tensor,
    digits: torch.Tensor,
    sign_mantissa: torch.Tensor,
    tails: torch.Tensor,
    kind: str,
    rows: int,
    cols: int,
    rows_per_table: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of a weight by number, ``[*ids.shape, cols]``; only blocks that hold these rows are decoded.

    Raises IndexError for an id outside 0 to rows - 1, UsageError, CorruptTensorError.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"expected ids of dtype int64 or int32, got {ids.dtype}")
    checks.layout(kind, rows, cols, rows_per_table, dtype)
    parts, weight = (code, digits, sign_mantissa, tails), (kind, rows, cols, rows_per_table, dtype)
    out = checks.empty((*ids.shape, cols), dtype)
    flat = ids.reshape(-1).numpy()
    if flat.size == 0:
        return out
    least, most = int(flat.min()), int(flat.max())
    if least < 0 or most >= rows:
        raise IndexError(f"index out of range: expected ids from 0 to {rows - 1}, got {least} to {most}")
    if flat.size == 1:
        _decode(parts, weight, least, least + 1, checks.flat_bytes(out))
        return out
    wanted, where = np.unique(flat, return_inverse=True)
    # One run of rows per stretch of neighbouring blocks: blocks are decoded whole, so rows in between cost nothing.
    begins = np.flatnonzero(np.diff(wanted // BLOCK_ROWS, prepend=-2) > 1)
    first = wanted[begins]
    length = np.append(wanted[begins[1:] - 1], wanted[-1]) + 1 - first
    offset = np.cumsum(length) - length
    table = checks.empty((int(length.sum()), cols), dtype)
    memory, row_bytes = checks.flat_bytes(table), cols * dtype.itemsize
    for row, count, at in zip(first.tolist(), length.tolist(), offset.tolist(), strict=True):
        _decode(parts, weight, row, row + count, memory[at * row_bytes : (at + count) * row_bytes])
    run = np.searchsorted(first, wanted, side="right") - 1
    position = wanted - first[run] + offset[run]
    torch.index_select(table, 0, torch.from_numpy(position[where]), out=out.view(-1, cols))
    return out


def linear(
    x: torch.Tensor,
    code: torch.Tensor,
    digits: torch.Tensor,
    sign_mantissa: torch.Tensor,
    tails: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    rows: int,
    cols: int,
    rows_per_table: int,
    dtype: torch.dtype,
    mode: str,
) -> torch.Tensor:
    """``x @ weight.T + bias``, ``[..., rows]``, for x ``[..., cols]`` of the weight's dtype.

    For a weight in FP8, x may be in BF16, FP16 or FP32: ``functional.linear(x, weight.to(x.dtype), bias)``.

    Raises UsageError for a wrong dtype, shape or mode, CorruptTensorError.
    """
    checks.layout(kind, rows, cols, rows_per_table, dtype)
    if mode not in MODES:
        raise UsageError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    shape = x.shape
    if not checks.multiplies(x.dtype, dtype) or not shape or shape[-1] != cols:
        raise UsageError(
            f"expected x of dtype {dtype} and shape [..., {cols}], got {x.dtype} and {tuple(shape)}; "
            "cast x, or decompress the model and cast that"
        )
    parts, weight = (code, digits, sign_mantissa, tails), (kind, rows, cols, rows_per_table, dtype)
    nbytes = rows * cols * dtype.itemsize
    if kind == "BF16":
        if mode == "fused":
            stats.count("fused", nbytes)
            return _product(x, parts, bias, (rows, cols, rows_per_table), products.LANES)
        order = exact.order_for(x, bias, rows)
        if order is not None:
            out = _product(x, parts, bias, (rows, cols, rows_per_table), order)
            if proven.settled(out):
                has_bias = bias is not None
                proven.recheck(
                    rows, cols, torch.get_num_threads(), has_bias, out, lambda: _decoded(x, parts, bias, weight)
                )
                stats.count("fused_exact", nbytes)
                return out
    stats.count("decoded", nbytes)
    return _decoded(x, parts, bias, weight)


def _decoded(x: torch.Tensor, parts: checks.Parts, bias: torch.Tensor | None, weight: Weight) -> torch.Tensor:
    """Decode the weight, then torch's product."""
    _kind, rows, cols, _rows_per_table, dtype = weight
    nbytes = rows * cols * dtype.itemsize
    buffer = SCRATCH.borrow(nbytes)
    try:
        _decode(parts, weight, 0, rows, buffer.bytes(nbytes))
        return functional.linear(x, buffer.matrix(rows, cols, dtype).to(x.dtype), bias)
    finally:
        SCRATCH.give_back(buffer)


def _decode(parts: checks.Parts, weight: Weight, begin: int, end: int, out: checks.Bytes) -> None:
    kind, rows, cols, rows_per_table, dtype = weight
    planes.decode(
        checks.part_bytes(parts), kind, kind == "BF16" and dtype is torch.float32, (rows, cols, rows_per_table),
        (begin, end), out, torch.get_num_threads(),
    )  # fmt: skip


def _product(
    x: torch.Tensor,
    parts: checks.Parts,
    bias: torch.Tensor | None,
    geometry: tuple[int, int, int],
    order: products.Order,
) -> torch.Tensor:
    """``x @ weight.T + bias`` straight from a weight coded as BF16, for x in BF16 or FP32."""
    rows = geometry[0]
    x = x.contiguous()
    out = checks.empty((*x.shape[:-1], rows), x.dtype)
    if bias is not None and bias.dtype not in _NAMES:
        bias = bias.float()
    products.linear(
        checks.part_bytes(parts), geometry, checks.flat_bytes(x), _NAMES[x.dtype], checks.flat_bytes(out),
        None if bias is None else checks.flat_bytes(bias.contiguous()),
        "BF16" if bias is None else _NAMES[bias.dtype], order, torch.get_num_threads(),
    )  # fmt: skip
    return out
