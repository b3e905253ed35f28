"""The linears under ``torch.autocast``: x, weight and bias are cast to its dtype, as those of nn.Linear are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from bitforbit.ops.autograd import DECODERS, FIELDS, Decoder, one_by_one
from bitforbit.ops.checks import multiplies
from bitforbit.ops.schema import LIBRARY, TILES_DTYPES

_KIND = "BF16"
"""Of tiles, where a call leaves it out: the dispatcher drops what is as by default."""
_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register() -> None:
    """Register the kernels; once per process."""
    for name, decode in DECODERS.items():
        op = getattr(torch.ops.bitforbit, name).default
        for device, key in _DEVICES.items():
            LIBRARY.impl(name, functools.partial(_linear, op, decode, FIELDS[name], device), key)
    for key in _DEVICES.values():
        LIBRARY.impl("tiles_linears", one_by_one, key)


def _linear(
    op: Callable[..., torch.Tensor],
    decode: Decoder,
    fields: tuple[int, ...],
    device: str,
    x: torch.Tensor,
    *arguments: Any,
) -> torch.Tensor:
    *parts, bias = arguments[:5]
    rest = arguments[5:]
    weight = tuple(rest[field] if field < len(rest) else _KIND for field in fields)
    target = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        x, bias = _cast(x, target), None if bias is None else _cast(bias, target)
        if multiplies(x.dtype, _dtype(weight)):
            return op(x, *parts, bias, *rest)
        return functional.linear(x, _cast(decode(tuple(parts), weight), target), bias)


def _dtype(weight: tuple[Any, ...]) -> torch.dtype:
    """Dtype of a weight: the last field where it can be any, that of its kind in tiles, BF16 in DF11."""
    last = weight[-1]
    return last if isinstance(last, torch.dtype) else TILES_DTYPES.get(last, torch.bfloat16)


def _cast(tensor: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    # Autocast leaves double precision and integers alone.
    return tensor.to(target) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
