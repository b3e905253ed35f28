"""The operators, called without torch's dispatcher where nothing but the CPU kernel would see the call.

The dispatcher and the gradient's wrapper take about 18 us per call from Python, as much as everything else around the
kernel. Gradients, autocast, compilers, exporters, functorch, dispatch modes and the profiler get the operators.
"""

from __future__ import annotations

import torch

from bitforbit.ops import cpu_impl

_Key = torch._C.DispatchKey
_INFERENCE = torch._C.DispatchKeySet(_Key.BackendSelect)
_ORDINARY = frozenset(keys.raw_repr() for keys in (_INFERENCE, _INFERENCE.add(_Key.ADInplaceOrView)))
"""What the dispatcher adds to every call outside of modes, with and without inference mode."""


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
    """As ``torch.ops.bitforbit.linear``."""
    op = cpu_impl.linear if _is_plain_call(x, bias) else torch.ops.bitforbit.linear.default
    result: torch.Tensor = op(
        x, code, digits, sign_mantissa, tails, bias, kind, rows, cols, rows_per_table, dtype, mode
    )
    return result


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
    """As ``torch.ops.bitforbit.embedding``."""
    op = cpu_impl.embedding if _is_plain_call(ids, None) else torch.ops.bitforbit.embedding.default
    result: torch.Tensor = op(ids, code, digits, sign_mantissa, tails, kind, rows, cols, rows_per_table, dtype)
    return result


def _is_plain_call(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or not x.is_cpu:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() in _ORDINARY
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._autograd._profiler_enabled()
    )
