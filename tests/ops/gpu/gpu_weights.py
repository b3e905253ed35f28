"""What the tests of the operators on GPU layouts share: one weight in each of the layouts, called the same way.

With a GPU the same tests could run on it: everything is made on ``DEVICE``, which the emulation lets be the CPU.
"""

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


def tiles(weight: torch.Tensor) -> Case:
    packed = ops.gpu.pack_tiles(weight)
    if packed is None:  # not smaller, as small matrices are
        words = weight.contiguous().view(torch.int16).numpy().view(np.uint16)
        packed = {name: torch.from_numpy(part.copy()) for name, part in naive.pack(words).items()}
    parts, (rows, cols) = tuple(packed.values()), weight.shape
    return Case(
        weight, parts, (rows, cols), ops.tiles_linear, ops.tiles_embedding,
        lambda begin, end: ops.tiles_decode(*parts, rows, cols, begin, end),
    )  # fmt: skip


def df11(weight: torch.Tensor) -> Case:
    """The middle one of three matrices of a unit."""
    rows, cols = weight.shape
    matrices = [gaussian((7, 33), seed=5), weight, gaussian((40, 9), seed=6)]
    unit = encode_unit([m.contiguous().view(torch.int16).numpy().view(np.uint16) for m in matrices])
    _, prepared = ops.gpu.df11_prepare(unit.tensors(), weight.device)
    parts, elements, first = tuple(prepared.values()), unit.num_weights, matrices[0].numel()
    return Case(
        weight, parts, (elements, first, rows, cols), ops.df11_linear, ops.df11_embedding,
        lambda begin, end: ops.df11_decode(
            *parts, elements, first + begin * cols, first + end * cols
        ).view(-1, cols),
    )  # fmt: skip


def planes_(weight: torch.Tensor) -> Case:
    """The functions behind the operators: on a CPU the operators themselves run the CPU's kernels."""
    parts, how = encode(weight)
    return Case(
        weight, parts, how, planes.linear, planes.embedding, lambda begin, end: planes.decode(*parts, *how, begin, end)
    )


LAYOUTS: dict[str, Callable[[torch.Tensor], Case]] = {"tiles": tiles, "df11": df11, "planes": planes_}
OPERATORS = ("tiles", "df11")
