"""One weight in each of the layouts for GPUs, called the same way: on a GPU, or on a CPU through the emulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bitforbit import ops
from bitforbit.codecs.df11.encode import encode_unit
from bitforbit.cuda.tiles import naive
from bitforbit.ops.gpu import planes
from torch_helpers import encode, gaussian


@dataclass
class Case:
    """A weight ``[rows, cols]``: its parts, what else the operators take, and the operators."""

    weight: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    fields: tuple
    linear_op: Callable[..., torch.Tensor]
    embedding_op: Callable[..., torch.Tensor]
    decode_op: Callable[..., torch.Tensor]

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None, mode: str = "exact") -> torch.Tensor:
        return self.linear_op(x, *self.parts, bias, *self.fields, mode)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding_op(ids, *self.parts, *self.fields)

    def decode(self, begin: int, end: int) -> torch.Tensor:
        return self.decode_op(begin, end)


def words(weight: torch.Tensor) -> np.ndarray:
    """The bits of a BF16 matrix."""
    return weight.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def tiles(weight: torch.Tensor) -> Case:
    packed = ops.gpu.pack_tiles(weight)
    if packed is None:  # not smaller, as small matrices are
        packed = {
            name: torch.from_numpy(part.copy()).to(weight.device) for name, part in naive.pack(words(weight)).items()
        }
    parts, (rows, cols) = tuple(packed.values()), weight.shape
    return Case(
        weight, parts, (rows, cols), ops.tiles_linear, ops.tiles_embedding,
        lambda begin, end: ops.tiles_decode(*parts, rows, cols, begin, end),
    )  # fmt: skip


def df11(weight: torch.Tensor) -> Case:
    """The middle one of three matrices of a unit."""
    rows, cols = weight.shape
    matrices = [gaussian((7, 33), seed=5), weight, gaussian((40, 9), seed=6)]
    unit = encode_unit([words(matrix) for matrix in matrices])
    _, prepared = ops.gpu.df11_prepare(unit, weight.device)
    parts, elements, first = tuple(prepared.values()), unit.num_weights, matrices[0].numel()
    return Case(
        weight, parts, (elements, first, rows, cols), ops.df11_linear, ops.df11_embedding,
        lambda begin, end: ops.df11_decode(
            *parts, elements, first + begin * cols, first + end * cols
        ).view(-1, cols),
    )  # fmt: skip


def planes_(weight: torch.Tensor) -> Case:
    """On a CPU the functions behind the GPU's operators: the operators themselves run the CPU's kernels there."""
    parts, how = encode(weight.cpu())
    parts = tuple(part.to(weight.device) for part in parts)
    where = ops if weight.is_cuda else planes
    return Case(
        weight, parts, how, where.linear, where.embedding,
        lambda begin, end: where.decode(*parts, *how, begin, end),
    )  # fmt: skip


LAYOUTS: dict[str, Callable[[torch.Tensor], Case]] = {"tiles": tiles, "df11": df11, "planes": planes_}
OPERATORS = ("tiles", "df11")
