"""What the kernels check of their arguments before any byte is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from bitforbit import dtypes
from bitforbit.codecs.planes.layout import Layout
from bitforbit.cpu import planes
from bitforbit.errors import UnsupportedDtypeError, UsageError

_LARGE_BYTES = 1 << 22

Bytes = npt.NDArray[np.uint8]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def multiplies(x: torch.dtype, weight: torch.dtype) -> bool:
    """Whether x can be multiplied by a weight of a dtype: its own, or, for FP8, what ``weight.to(x.dtype)`` gives."""
    return x == weight or (weight.itemsize == 1 and weight.is_floating_point and x in FLOATS)


PARTS = ("code", "digits", "sign_mantissa", "tails")
"""Names of the parts of a compressed weight, in their order."""


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors name of a torch dtype. Raises UnsupportedDtypeError."""
    name = dtypes.ARRAY_NAMES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise UnsupportedDtypeError(f"expected a dtype among {', '.join(dtypes.ARRAY_NAMES)}, got {dtype}")
    return name


@lru_cache(maxsize=4096)
def layout(kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype) -> Layout:
    """Layout of a weight. Raises CorruptTensorError if these numbers describe none."""
    config: dict[str, int | str] = {"kind": kind, "rows": rows, "cols": cols, "rows_per_table": rows_per_table}
    return Layout.from_config(config, dtype_name(dtype), (rows, cols))


def part_bytes(parts: Parts) -> dict[str, Bytes]:
    """The parts as arrays. Raises UsageError unless they are contiguous bytes in one dimension.

    Their lengths are checked by the native code, which raises CorruptTensorError.
    """
    views = {}
    for name, part in zip(PARTS, parts, strict=True):
        if part.dtype is not torch.uint8 or part.dim() != 1 or not part.is_contiguous():
            raise UsageError(
                f"expected part {name} to be contiguous uint8 of one dimension, got {part.dtype} of shape "
                f"{tuple(part.shape)}"
            )
        views[name] = part.numpy()
    return views


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized contiguous tensor; a large one on huge pages, which are several times faster to touch first."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(planes.empty(nbytes)).view(dtype).view(shape)


def flat_bytes(tensor: torch.Tensor) -> Bytes:
    """The memory of a contiguous tensor as bytes."""
    view: Bytes = tensor.view(-1).view(torch.uint8).numpy()
    return view
