"""The stored form of one DF11 unit: matrices compressed together with one code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

THREADS_PER_BLOCK = 512
BYTES_PER_THREAD = 8
BLOCK_BYTES = THREADS_PER_BLOCK * BYTES_PER_THREAD
GAP_BYTES_PER_BLOCK = THREADS_PER_BLOCK * 5 // 8

MAX_EXPONENT = 239
"""Larger values are pointers to other decode tables, so larger exponents have no code."""

MAX_CODE_BITS = 32
MAX_TABLES = 17
MAX_WEIGHTS = (1 << 32) - 1
MAX_STREAM_BYTES = (1 << 31) - 1

TENSOR_NAMES = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions")


@dataclass(frozen=True)
class Df11Unit:
    """The six tensors of a unit of n weights in m matrices, as they are stored; B blocks of 4096 stream bytes.

    luts ``[tables + 1, 256]``: decode tables, then the code length of every exponent. encoded_exponent
    ``[n_bytes]``: the codes, most significant bit first. sign_mantissa ``[n]``: bit 7 sign, bits 6..0 mantissa.
    output_positions ``[4 (B + 1)]``: little-endian uint32, the first weight of each block, then n. gaps ``[320 B]``:
    5 bits per 8 stream bytes. split_positions ``[m - 1]``: where matrices 2..m begin, in weights.
    """

    luts: npt.NDArray[np.uint8]
    encoded_exponent: npt.NDArray[np.uint8]
    sign_mantissa: npt.NDArray[np.uint8]
    output_positions: npt.NDArray[np.uint8]
    gaps: npt.NDArray[np.uint8]
    split_positions: npt.NDArray[np.int64]

    @property
    def num_weights(self) -> int:
        """Weights of all matrices together."""
        return self.sign_mantissa.size

    @property
    def num_blocks(self) -> int:
        """Blocks of the stream."""
        return -(-self.encoded_exponent.size // BLOCK_BYTES)

    def tensors(self) -> Mapping[str, npt.NDArray[np.uint8] | npt.NDArray[np.int64]]:
        """The six arrays by the suffix of their tensor names."""
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    @property
    def nbytes(self) -> int:
        """Bytes of the six arrays together."""
        return sum(array.nbytes for array in self.tensors().values())
