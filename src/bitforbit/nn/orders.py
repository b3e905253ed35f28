"""Proves, before a model is used, which of its exact products can run straight from tiles on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bitforbit.cuda.fused.order import Order
from bitforbit.nn.classes import Linear
from bitforbit.nn.gpu_specs import TilesSpec
from bitforbit.ops import gpu


def prove_orders(
    model: nn.Module, tokens: Iterable[int] = (1,), dims: Iterable[int] = (2, 3)
) -> dict[gpu.Product, Order | None]:
    """The orders of torch's own sums for all BF16 linears of a model in tiles, for these numbers of tokens.

    None for a product that no kernel can follow: its weight is decoded. ``dims`` are the numbers of dimensions that
    activations have (2: [tokens, features]; 3: [batch, sequence, features]). Without this, products are proven while
    the model runs, but never within the capture of a CUDA graph. What was proven is kept on disk. Takes the memory of
    the largest matrix. Raises UsageError for a model in tiles on a CPU, torch.OutOfMemoryError.
    """
    dims, tokens, found = tuple(dims), tuple(tokens), {}
    for device, linears in _by_device(model).items():
        products = [
            gpu.Product(
                *module._bitforbit_specs["weight"].matrix_shape(), count, dim, gpu.ALIGNMENT, _bias_alignment(module)
            )
            for count in tokens
            for module in linears
            for dim in dims
        ]
        found.update(gpu.prove(products, device))
    return found


def _by_device(model: nn.Module) -> dict[torch.device, list[Linear]]:
    found: dict[torch.device, list[Linear]] = {}
    for module in model.modules():
        spec = module._bitforbit_specs["weight"] if isinstance(module, Linear) else None
        if isinstance(module, Linear) and isinstance(spec, TilesSpec) and spec.kind == "BF16":
            found.setdefault(module._bitforbit_parts("weight")[0].device, []).append(module)
    return found


def _matrix_shape(module: Linear) -> tuple[int, int]:
    return module._bitforbit_specs["weight"].matrix_shape()


def _bias_alignment(module: Linear) -> int:
    bias = module._parameters.get("bias")
    return 0 if bias is None else gpu.alignment_of(bias)
