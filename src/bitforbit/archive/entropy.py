"""How far a float tensor could be compressed by coding its exponents (docs/format.md, section 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.codecs.base import Bytes
from bitforbit.cpu import planes as kernels


def exponent_histogram(data: Bytes, dtype: str) -> npt.NDArray[np.int64]:
    """How often each exponent occurs: 256 counts.

    data is the tensor's little-endian bytes, dtype one of ``dtypes.FLOAT_LAYOUTS``.
    """
    return kernels.exponent_histogram(data, dtype).astype(np.int64)


def coded_kind(data: Bytes, dtype: str) -> str:
    """The float that the tensor is coded as: BF16 for F32 whose lower half is zero everywhere, else dtype."""
    return "BF16" if dtype == "F32" and kernels.is_widened_bf16(data) else dtype


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Shannon entropy of the distribution, in bits per element; 0 for no elements."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    share = counts[counts > 0] / total
    return max(0.0, float(-(share * np.log2(share)).sum()))


def shannon_bound(exponent_entropy: float, kind: str) -> float:
    """Bits per element of a kind of float: the exponent at its entropy, sign and mantissa as they are."""
    layout = dtypes.FLOAT_LAYOUTS[kind]
    return exponent_entropy + 1 + layout.mantissa_bits
