"""The tensors of a block side by side in one piece of memory, so that one copy moves them all.

| part 0 | pad | part 1 | pad | ...      each on a boundary of 256 bytes
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

ALIGNMENT = 256
"""In bytes: what torch's own memory on a GPU has at least, and more than any kernel here asks for."""


class Key(NamedTuple):
    """One tensor of a block: the module's number among the block's modules, and the name of its parameter."""

    module: int
    name: str


class FileRange(NamedTuple):
    """Where a tensor's bytes lie in a file."""

    path: Path
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """A tensor's place in an image: its first byte, dtype and shape."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def view(self, image: torch.Tensor) -> torch.Tensor:
        """It, as a view into an image, uint8 ``[nbytes]``."""
        return image[self.begin : self.begin + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Image:
    """How the tensors of a block lie side by side."""

    pieces: Mapping[Key, Piece]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[tuple[Key, torch.dtype, Sequence[int]]]) -> Image:
        """In this order."""
        pieces: dict[Key, Piece] = {}
        end = 0
        for key, dtype, shape in tensors:
            pieces[key] = Piece(end, dtype, tuple(shape))
            end = padded(end + pieces[key].nbytes)
        return cls(pieces, end)


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to the boundary on which tensors begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
