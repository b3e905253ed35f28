"""Products of activations with compressed BF16 matrices, in stated orders of summation.

``out = x @ weight.T + bias``: FP32 sums in the order that :class:`Order` names, then the bias (FP32), then one rounding
to the dtype of ``x`` (to nearest even). An order gives the same bits on every instruction set, for every number of
threads, and for a token alone as among others. Arrays are views of memory as bytes, contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitforbit.cpu import _native
from bitforbit.cpu.isa import active, implementations
from bitforbit.cpu.planes import Bytes
from bitforbit.errors import CorruptTensorError, UsageError

_ITEM_BYTES = {"BF16": 2, "F32": 4}
_WITHOUT_BLOCKS = frozenset({"lanes", "lanes_pairwise"})


@dataclass(frozen=True)
class Order:
    """An order of summation.

    ``family`` is one of :func:`families`; ``k_block`` is the number of columns whose products are summed apart, from
    zero, before they are added to the sum of the blocks before (0: all columns are one block; ``lanes`` has no other).
    """

    family: str
    k_block: int = 0


LANES = Order("lanes")
"""The order of fused mode: 16 lanes per output, each chunk of 32 columns spread over them (native/isa/scalar)."""


def families() -> dict[str, bool]:
    """Every compiled family, with whether this CPU can run it (with BF16 activations)."""
    best = [name for name, supported in implementations().items() if supported][-1]
    return {family: bool(_native.linear_implementation(family, best, False)) for family in _native.linear_families()}


def implementation(family: str, x_dtype: str = "BF16") -> str:
    """Name of the instruction set that a product of this family would use now; "" if there is none."""
    return _native.linear_implementation(family, active(), x_dtype == "F32")


def linear(
    parts: Mapping[str, Bytes],
    geometry: tuple[int, int, int],
    x: Bytes,
    x_dtype: str,
    out: Bytes,
    bias: Bytes | None,
    bias_dtype: str,
    order: Order,
    threads: int,
) -> None:
    """Multiply by an encoded matrix. geometry is (rows, cols, rows_per_table), the kind BF16.

    ``x`` is ``[tokens, cols]`` of ``x_dtype`` ("BF16" or "F32"), ``out`` ``[tokens, rows]`` of the same, ``bias``
    ``[rows]`` of ``bias_dtype``. Raises CorruptTensorError (``out`` is then undefined) and UsageError.
    """
    rows, cols, rows_per_table = geometry
    isa = _check(rows, cols, x, x_dtype, out, bias, bias_dtype, order)
    if rows_per_table < 1 or rows_per_table % 16:
        raise UsageError(f"expected rows_per_table to be a multiple of 16, got {rows_per_table}")
    try:
        _native.linear(
            parts["code"], parts["digits"], parts["sign_mantissa"], parts["tails"], rows, cols, rows_per_table,
            x, x_dtype == "F32", out, bias, bias_dtype == "F32", order.family, order.k_block, isa, threads,
        )  # fmt: skip
    except _native.CorruptData as error:
        raise CorruptTensorError(str(error)) from None


def linear_dense(
    weight: Bytes,
    geometry: tuple[int, int],
    x: Bytes,
    x_dtype: str,
    out: Bytes,
    bias: Bytes | None,
    bias_dtype: str,
    order: Order,
    threads: int,
) -> None:
    """Multiply by a plain BF16 matrix in the same order: the same bits as :func:`linear`. geometry is (rows, cols)."""
    rows, cols = geometry
    isa = _check(rows, cols, x, x_dtype, out, bias, bias_dtype, order)
    if weight.size != 2 * rows * cols:
        raise UsageError(f"expected {2 * rows * cols} bytes of weights for {rows} x {cols}, got {weight.size}")
    _native.linear_dense(
        weight,
        rows,
        cols,
        x,
        x_dtype == "F32",
        out,
        bias,
        bias_dtype == "F32",
        order.family,
        order.k_block,
        isa,
        threads,
    )


def _check(
    rows: int, cols: int, x: Bytes, x_dtype: str, out: Bytes, bias: Bytes | None, bias_dtype: str, order: Order
) -> str:
    """Refuse arguments that do not fit together; the instruction set to use."""
    if rows < 1 or cols < 1:
        raise UsageError(f"expected at least one row and one column, got {rows} x {cols}")
    if x_dtype not in _ITEM_BYTES or bias_dtype not in _ITEM_BYTES:
        raise UsageError(f"expected dtypes BF16 or F32, got {x_dtype!r} for x and {bias_dtype!r} for the bias")
    item = _ITEM_BYTES[x_dtype]
    tokens, rest = divmod(x.size, item * cols)
    if rest or out.size != tokens * item * rows:
        raise UsageError(
            f"expected x of [tokens, {cols}] and out of [tokens, {rows}] in {x_dtype}, "
            f"got {x.size} and {out.size} bytes"
        )
    if bias is not None and bias.size != rows * _ITEM_BYTES[bias_dtype]:
        raise UsageError(f"expected a bias of {rows} numbers in {bias_dtype}, got {bias.size} bytes")
    if order.k_block < 0 or (order.k_block and order.family in _WITHOUT_BLOCKS):
        allowed = "0" if order.family in _WITHOUT_BLOCKS else "0 or positive"
        raise UsageError(f"expected k_block of family {order.family!r} to be {allowed}, got {order.k_block}")
    isa = active()
    if not _native.linear_implementation(order.family, isa, x_dtype == "F32"):
        known = ", ".join(_native.linear_families())
        raise UsageError(
            f"expected a family of products that takes {x_dtype} activations on {isa}, among {known}; "
            f"got {order.family!r}"
        )
    return isa
