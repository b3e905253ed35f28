"""The operators on a CPU."""

from __future__ import annotations

import torch
from torch.nn import functional

from bitforbit.cpu import planes
from bitforbit.errors import UsageError
from bitforbit.ops import checks, reference, stats
from bitforbit.ops.schema import LIBRARY, MODES
from bitforbit.ops.scratch import SCRATCH

_BLOCK_ROWS = 16


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
    layout = checks.layout(kind, rows, cols, rows_per_table, dtype)
    if not 0 <= begin <= end <= rows:
        raise UsageError(f"expected a range of rows within 0 to {rows}, got {begin} to {end}")
    parts = checks.part_bytes((code, digits, sign_mantissa, tails))
    out = torch.empty((end - begin, cols), dtype=dtype)
    wide = kind != checks.dtype_name(dtype)
    planes.decode(
        parts, kind, wide, (layout.rows, cols, rows_per_table), (begin, end), checks.flat_bytes(out), _threads()
    )
    return out


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
    weight = (kind, rows, cols, rows_per_table, dtype)
    if ids.numel() == 0:
        return torch.empty((*ids.shape, cols), dtype=dtype)
    wanted, where = torch.unique(ids, return_inverse=True)
    if int(wanted[0]) < 0 or int(wanted[-1]) >= rows:
        raise IndexError(f"index out of range: expected ids from 0 to {rows - 1}, got {wanted[0]} to {wanted[-1]}")
    blocks = wanted // _BLOCK_ROWS
    # One run of rows per stretch of neighbouring blocks: blocks are decoded whole, so rows in between cost nothing.
    first = torch.cat((torch.tensor([True]), blocks[1:] - blocks[:-1] > 1))
    starts = first.nonzero().flatten().tolist()
    runs = [(int(wanted[a]), int(wanted[b - 1]) + 1) for a, b in zip(starts, [*starts[1:], len(wanted)], strict=True)]
    decoded = [decode(code, digits, sign_mantissa, tails, *weight, begin, end) for begin, end in runs]
    base, shifts = 0, []
    for begin, end in runs:
        shifts.append(base - begin)
        base += end - begin
    position = wanted + torch.tensor(shifts, dtype=wanted.dtype)[first.cumsum(0) - 1]
    table = decoded[0] if len(decoded) == 1 else torch.cat(decoded)
    return table[position[where]]


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

    Raises UsageError for a wrong dtype, shape or mode, CorruptTensorError.
    """
    checks.layout(kind, rows, cols, rows_per_table, dtype)
    if mode not in MODES:
        raise UsageError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    if x.dtype != dtype or x.dim() == 0 or x.shape[-1] != cols:
        raise UsageError(
            f"expected x of dtype {dtype} and shape [..., {cols}], got {x.dtype} and {tuple(x.shape)}; "
            "cast x, or decompress the model and cast that"
        )
    parts = checks.part_bytes((code, digits, sign_mantissa, tails))
    geometry = (rows, cols, rows_per_table)
    wide = kind != checks.dtype_name(dtype)
    nbytes = rows * cols * dtype.itemsize
    with SCRATCH.borrow(nbytes) as buffer:
        weight = buffer.view(dtype).view(rows, cols)
        planes.decode(parts, kind, wide, geometry, (0, rows), buffer.numpy(), _threads())
        if mode == "fused" and kind == "BF16":
            stats.count("fused", nbytes)
            return reference.lanes(x, weight, bias)
        stats.count("decoded", nbytes)
        return functional.linear(x, weight, bias)


def _threads() -> int:
    return int(torch.get_num_threads())
