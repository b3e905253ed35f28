"""The linears under ``torch.autocast``: x, weight and bias are cast to its dtype, as those of nn.Linear are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from bitforbit.ops.autograd import DECODERS, FIELDS, Decoder, one_by_one
from bitforbit.ops.schema import LIBRARY

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
    op: Callable[..., torch.Tensor], decode: Decoder, count: int, device: str, x: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    *parts, bias = arguments[:5]
    fields, rest = arguments[5 : 5 + count], arguments[5 + count :]
    target = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        x, bias = _cast(x, target), None if bias is None else _cast(bias, target)
        if _dtype(fields) == x.dtype:
            return op(x, *parts, bias, *fields, *rest)
        return functional.linear(x, _cast(decode(tuple(parts), fields), target), bias)


def _dtype(fields: tuple[Any, ...]) -> torch.dtype:
    """Dtype of a weight: the last field where it can be any, BF16 in the layouts of GPUs."""
    return fields[-1] if isinstance(fields[-1], torch.dtype) else torch.bfloat16


def _cast(tensor: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    # Autocast leaves double precision and integers alone.
    return tensor.to(target) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
