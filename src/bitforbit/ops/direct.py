"""The operators, called without torch's dispatcher where nothing but the device's kernel would see the call.

The dispatcher and the gradient's wrapper take about 18 us per call from Python, as much as everything else around the
kernel. Gradients, autocast, compilers, exporters, functorch, dispatch modes and the profiler get the operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitforbit.ops import cpu_impl
from bitforbit.ops.gpu import df11, fused, planes, tiles
from bitforbit.ops.gpu.fused import Matrix

_Key = torch._C.DispatchKey
_INFERENCE = torch._C.DispatchKeySet(_Key.BackendSelect)
_ORDINARY = frozenset(keys.raw_repr() for keys in (_INFERENCE, _INFERENCE.add(_Key.ADInplaceOrView)))
"""What the dispatcher adds to every call outside of modes, with and without inference mode."""


def linear(
    x: Tensor, code: Tensor, digits: Tensor, sign_mantissa: Tensor, tails: Tensor, bias: Tensor | None,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype, mode: str,
) -> Tensor:  # fmt: skip
    """As ``torch.ops.bitforbit.linear``."""
    op = torch.ops.bitforbit.linear.default
    if _is_plain_call(x, bias):
        op = cpu_impl.linear if code.is_cpu else planes.linear
    result: Tensor = op(x, code, digits, sign_mantissa, tails, bias, kind, rows, cols, rows_per_table, dtype, mode)
    return result


def embedding(
    ids: Tensor, code: Tensor, digits: Tensor, sign_mantissa: Tensor, tails: Tensor,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As ``torch.ops.bitforbit.embedding``."""
    op = torch.ops.bitforbit.embedding.default
    if _is_plain_call(ids, None):
        op = cpu_impl.embedding if code.is_cpu else planes.embedding
    result: Tensor = op(ids, code, digits, sign_mantissa, tails, kind, rows, cols, rows_per_table, dtype)
    return result


def tiles_linear(
    x: Tensor, tiles_: Tensor, escapes: Tensor, offsets: Tensor, header: Tensor, bias: Tensor | None,
    rows: int, cols: int, mode: str, group: Sequence[int] = (), kind: str = "BF16",
) -> Tensor:  # fmt: skip
    """As ``torch.ops.bitforbit.tiles_linear``."""
    op = tiles.linear if _is_plain_call(x, bias) else torch.ops.bitforbit.tiles_linear.default
    result: Tensor = op(x, tiles_, escapes, offsets, header, bias, rows, cols, mode, group, kind)
    return result


def ordinary_tiles_linears(x: Tensor, matrices: Sequence[Matrix], cols: int, group: tuple[int, ...]) -> list[Tensor]:
    """``torch.ops.bitforbit.tiles_linears`` in mode ``"fused"``, for calls that :func:`is_ordinary_call` has allowed.

    At most 64 tokens. The results may lie in one memory.
    """
    if not torch._C._autograd._profiler_enabled():
        return fused.linears(x, matrices, cols, group)
    parts, biases = [part for matrix in matrices for part in matrix.parts], [matrix.bias for matrix in matrices]
    rows, kind = [matrix.rows for matrix in matrices], matrices[0].kind
    result: list[Tensor] = torch.ops.bitforbit.tiles_linears.default(x, parts, biases, rows, cols, "fused", group, kind)
    return result


def tiles_embedding(
    ids: Tensor, tiles_: Tensor, escapes: Tensor, offsets: Tensor, header: Tensor, rows: int, cols: int,
    kind: str = "BF16",
) -> Tensor:  # fmt: skip
    """As ``torch.ops.bitforbit.tiles_embedding``."""
    op = tiles.embedding if _is_plain_call(ids, None) else torch.ops.bitforbit.tiles_embedding.default
    result: Tensor = op(ids, tiles_, escapes, offsets, header, rows, cols, kind)
    return result


def df11_linear(
    x: Tensor, tables: Tensor, stream: Tensor, sign_mantissa: Tensor, index: Tensor, bias: Tensor | None,
    elements: int, begin: int, rows: int, cols: int, mode: str,
) -> Tensor:  # fmt: skip
    """As ``torch.ops.bitforbit.df11_linear``."""
    op = df11.linear if _is_plain_call(x, bias) else torch.ops.bitforbit.df11_linear.default
    result: Tensor = op(x, tables, stream, sign_mantissa, index, bias, elements, begin, rows, cols, mode)
    return result


def df11_embedding(
    ids: Tensor, tables: Tensor, stream: Tensor, sign_mantissa: Tensor, index: Tensor,
    elements: int, begin: int, rows: int, cols: int,
) -> Tensor:  # fmt: skip
    """As ``torch.ops.bitforbit.df11_embedding``."""
    op = df11.embedding if _is_plain_call(ids, None) else torch.ops.bitforbit.df11_embedding.default
    result: Tensor = op(ids, tables, stream, sign_mantissa, index, elements, begin, rows, cols)
    return result


def _is_plain_call(x: Tensor, bias: Tensor | None) -> bool:
    return is_ordinary_call(x, bias) and not torch._C._autograd._profiler_enabled()


def is_ordinary_call(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing but the device's kernel, and a profiler, would see the call of an operator."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or not (x.is_cpu or x.is_cuda):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() in _ORDINARY
        and not torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")
        and not torch._C._is_torch_function_mode_enabled()
    )


def is_transformed() -> bool:
    """Within ``torch.func`` or forward-mode differentiation, whose rules our operators do not have."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
