"""How far a float tensor could be compressed by coding its exponents (docs/format.md, section 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.codecs.base import Bytes

_PIECE_ELEMENTS = 1 << 18


def exponent_histogram(data: Bytes, dtype: str) -> npt.NDArray[np.int64]:
    """How often each exponent occurs: 256 counts.

    data is the tensor's little-endian bytes, dtype one of ``dtypes.FLOAT_LAYOUTS``.
    """
    layout = dtypes.FLOAT_LAYOUTS[dtype]
    counts = np.zeros(256, dtype=np.int64)
    step = _PIECE_ELEMENTS * layout.itemsize
    for begin in range(0, len(data), step):
        words = data[begin : begin + step].view(f"<u{layout.itemsize}")
        exponents = (words >> layout.mantissa_bits) & ((1 << layout.exponent_bits) - 1)
        counts += np.bincount(exponents.astype(np.uint8), minlength=256)
    return counts


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Shannon entropy of the distribution, in bits per element; 0 for no elements."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    share = counts[counts > 0] / total
    return max(0.0, float(-(share * np.log2(share)).sum()))


def shannon_bound(exponent_entropy: float, dtype: str) -> float:
    """Bits per element: the exponent at its entropy, sign and mantissa as they are."""
    layout = dtypes.FLOAT_LAYOUTS[dtype]
    return exponent_entropy + 1 + layout.mantissa_bits
