"""The values of a compressed weight, decoded as far as they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from bitforbit import ops

if TYPE_CHECKING:
    from bitforbit.nn.spec import CompressedSpec


def decode(spec: CompressedSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """A fresh plain tensor of ``spec.shape``."""
    return spec.decode(parts, 0, spec.matrix_shape()[0]).view(spec.shape)


class Values:
    """The plain tensor behind a :class:`CompressedWeight`, whole or slice by slice of its first dimension."""

    def __init__(self, spec: CompressedSpec, parts: Sequence[torch.Tensor]) -> None:
        """For modules: spec and parts must fit each other."""
        self.spec = spec
        self.parts = tuple(parts)
        self.is_stack = len(spec.shape) > 2 and spec.matrix_shape()[0] % spec.shape[0] == 0
        """Whether slices can be decoded apart: matrices of experts."""
        self._tensor: torch.Tensor | None = None
        self._missing: set[int] | None = None

    @property
    def device(self) -> torch.device:
        """Where it is computed with."""
        return self.parts[0].device

    @property
    def is_decoded(self) -> bool:
        """Whether anything was decoded."""
        return self._tensor is not None

    def whole(self) -> torch.Tensor:
        """The plain tensor."""
        if self._tensor is None:
            self._tensor, self._missing = decode(self.spec, self.parts), set()
        return self.slices(range(self.spec.shape[0])) if self._missing else self._tensor

    def slices(self, wanted: Iterable[int]) -> torch.Tensor:
        """A tensor of the full shape in which only these slices of a stack need be valid.

        The others cost neither time nor, where the system commits memory on first use, memory.
        """
        spec = self.spec
        if self._tensor is None or self._missing is None:
            self._tensor, self._missing = self._empty(), set(range(spec.shape[0]))
        rows, cols = spec.matrix_shape()
        rows //= spec.shape[0]
        for index in self._missing.intersection(wanted):
            spec.decode_into(self._tensor[index].view(rows, cols), self.parts, index * rows)
            self._missing.discard(index)
        return self._tensor

    def _empty(self) -> torch.Tensor:
        device = self.device
        if device.type == "cpu":
            return ops.empty(self.spec.shape, self.spec.dtype)
        return torch.empty(self.spec.shape, dtype=self.spec.dtype, device=device)
