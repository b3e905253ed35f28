"""Exact mode without decoding: products straight from tiles, where their order was proven to be torch's own."""

from __future__ import annotations

import torch
from torch.nn import functional

from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu import fused, proofs, queues, runtime


def linear(x: torch.Tensor, parts: Parts, rows: int, cols: int, bias: torch.Tensor | None) -> torch.Tensor | None:
    """``functional.linear(x, weight, bias)`` with torch's bits from a weight in tiles, ``[..., rows]``.

    None if the weight is to be decoded, because no order was proven or the arguments are not what kernels take. Raises
    OrderMismatchError where ``BITFORBIT_PARANOID`` is set, and what the fused product raises.
    """
    policy, device = runtime.current_policy(), parts[0].device
    if not policy.proven_orders or x.numel() > fused.MAX_TOKENS * cols or x.device != device or x.dim() == 0:
        return None
    product = proofs.product_of(x, bias, rows)
    if product is None or product.cols != cols or (bias is not None and bias.device != device):
        return None
    capturing = runtime.current_place(device).capture != 0
    may_prove = not capturing and not queues.in_graph_tree(device)
    order = proofs.lookup(device, product, policy.prove_after if may_prove else None)
    if order is None:
        return None
    matrix = (fused.Matrix(parts, rows, bias),)
    if capturing and not fused.prepare(matrix, cols, ()):
        return None
    (out,) = fused.linears(x, matrix, cols, (), order=order, way="fused_exact")
    if not capturing:
        proofs.recheck(device, product, out, lambda: _decoded(x, parts, rows, cols, bias))
    return out


def _decoded(x: torch.Tensor, parts: Parts, rows: int, cols: int, bias: torch.Tensor | None) -> torch.Tensor:
    weight = torch.ops.bitforbit.tiles_decode.default(*parts, rows, cols, 0, rows)
    return functional.linear(x, weight, bias)
