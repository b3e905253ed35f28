"""Kinds of weights that tiles hold: BF16, FP16, FP8 (E4M3). Data that kernels have as constants, too (weights_*.cuh).

In registers a weight has 16 bits: BF16 and FP16 as they are; FP8 as sign [15], exponent [10:7], mantissa [6:4], which
is its value in BF16 times 2^-120. A NaN of FP8 has the exponent 255 there, as in BF16, so that it is an escape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitforbit.errors import UnsupportedDtypeError

Words = npt.NDArray[np.uint16]
Elements = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

WINDOW = 8


@dataclass(frozen=True)
class Kind:
    """A kind of weights. Bits are those of the form in registers, where the sign is bit 15."""

    name: str
    """As safetensors has it."""
    number: int
    """``BITFORBIT_WEIGHTS`` of the kernels."""
    item_bytes: int
    """Of an element of a matrix."""
    shift: int
    """Lowest bit of the exponent."""
    exponents: int
    """Exponents that there are, but for 255 as that of FP8's NaN."""
    mantissa: tuple[int, ...]
    """Bits of the mantissa."""
    word_bytes: tuple[int, ...]
    """Words of a lane, 4 bytes each, are loaded together in runs of so many bytes; a run of all lanes is together."""

    @property
    def max_base(self) -> int:
        """Last exponent at which the window may begin."""
        return self.exponents - WINDOW

    @property
    def lane_words(self) -> int:
        """32-bit words of a lane in a tile."""
        return sum(self.word_bytes) // 4

    @property
    def tile_bytes(self) -> int:
        """Of a tile without its escapes."""
        return 32 * sum(self.word_bytes)

    @property
    def field(self) -> int:
        """Mask of the exponent's bits."""
        return (255 if self.exponents < 32 else self.exponents - 1) << self.shift

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """Macros of its kernels."""
        return (("BITFORBIT_WEIGHTS", str(self.number)),) if self.number else ()

    @property
    def outputs(self) -> str:
        """What activations and outputs of products are: FP16 for weights of FP16, else BF16."""
        return "F16" if self.name == "F16" else "BF16"

    def words(self, elements: Elements) -> Words:
        """Elements of a matrix in the form in registers."""
        if self.item_bytes == 2:
            return elements.view(np.uint16)
        byte = elements.astype(np.uint16)
        word = (byte & 0x80) << 8 | (byte & 0x7F) << 4
        return np.where(byte & 0x7F == 0x7F, word | 0x7F80, word).astype(np.uint16)

    def elements(self, words: Words) -> Elements:
        """Inverse of :meth:`words`."""
        return words if self.item_bytes == 2 else (words >> 8 & 0x80 | words >> 4 & 0x7F).astype(np.uint8)


BF16 = Kind("BF16", 0, 2, 7, 256, (*range(7),), (16, 16, 4, 4, 4))
F16 = Kind("F16", 1, 2, 10, 32, (*range(10),), (16, 16, 16, 8))
F8_E4M3 = Kind("F8_E4M3", 2, 1, 7, 16, (4, 5, 6), (16, 4, 4, 4))
KINDS = (BF16, F16, F8_E4M3)
NAMES = tuple(kind.name for kind in KINDS)


def of(name: str) -> Kind:
    """The kind of a name. Raises UnsupportedDtypeError."""
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise UnsupportedDtypeError(f"expected weights of a kind among {', '.join(NAMES)} for tiles, got {name!r}")
