"""What the tests of operators and modules share: weights in parts, comparison of bits."""

from __future__ import annotations

import numpy as np
import torch

from bitforbit import tensors
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.codecs.planes.layout import matrix_view

KINDS = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

Weight = tuple[str, int, int, int, torch.dtype]


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every bit pattern: NaN payloads, infinities, denormals, both zeros."""
    size = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def encode(weight: torch.Tensor, kind: str | None = None) -> tuple[tuple[torch.Tensor, ...], Weight]:
    """Parts of a matrix, and what the operators want to know of it."""
    data, dtype, shape = tensors.to_bytes(weight)
    encoded = PlanesCodec().encode_always(data, dtype, shape, kind or dtype, 1)
    parts = tuple(torch.from_numpy(part) for part in encoded.parts.values())
    rows, cols = matrix_view(shape)
    return parts, (kind or dtype, rows, cols, int(encoded.config["rows_per_table"]), weight.dtype)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (got, expected))
    different = (a != b).nonzero()
    assert not len(different), f"{len(different)} of {len(a)} bytes differ, first at byte {int(different[0])}"
