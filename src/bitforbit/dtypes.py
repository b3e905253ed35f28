"""The element types of safetensors files, and how their floats split into sign, exponent and mantissa.

Names are those of the safetensors header. Widths are in bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bitforbit.errors import UnknownDtypeError, UnsupportedDtypeError

# Width in bits of every dtype that the safetensors format names (safetensors 0.8, `tensor.rs`).
SAFETENSORS_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class FloatLayout:
    """Field widths, in bits, of a float that the codecs split. The sign is the top bit, the mantissa the low bits."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return (1 + self.exponent_bits + self.mantissa_bits) // 8


FLOAT_LAYOUTS: dict[str, FloatLayout] = {
    "BF16": FloatLayout(8, 7),
    "F16": FloatLayout(5, 10),
    "F32": FloatLayout(8, 23),
    "F8_E4M3": FloatLayout(4, 3),
    "F8_E5M2": FloatLayout(5, 2),
}

# Safetensors name of every array dtype; numpy with ml_dtypes and torch call them the same.
ARRAY_NAMES: dict[str, str] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip

_ML_DTYPES: dict[str, type] = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


def bits(dtype: str) -> int:
    """Width in bits of a safetensors dtype. Raises UnknownDtypeError for a name the format does not have."""
    try:
        return SAFETENSORS_BITS[dtype]
    except KeyError:
        known = ", ".join(sorted(SAFETENSORS_BITS))
        raise UnknownDtypeError(f"expected a safetensors dtype ({known}), got {dtype!r}") from None


def from_numpy(dtype: npt.DTypeLike) -> str:
    """Safetensors name of a numpy (or ml_dtypes) dtype."""
    name = np.dtype(dtype).name
    if name not in ARRAY_NAMES or not np.dtype(dtype).isnative:
        raise UnsupportedDtypeError(
            f"expected a native-endian numpy or ml_dtypes dtype that safetensors can hold, got {np.dtype(dtype)!r}; "
            "convert the array first"
        )
    return ARRAY_NAMES[name]


def to_numpy(dtype: str) -> np.dtype[np.generic]:
    """Numpy (or ml_dtypes) dtype of a safetensors name."""
    if dtype in _ML_DTYPES:
        return np.dtype(_ML_DTYPES[dtype])
    for numpy_name, name in ARRAY_NAMES.items():
        if name == dtype:
            return np.dtype(numpy_name)
    raise UnsupportedDtypeError(f"numpy has no array type for safetensors dtype {dtype!r}")


def split(words: npt.NDArray[np.generic], layout: FloatLayout) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Split bit patterns into (exponent, rest), where rest is the sign bit above the mantissa bits."""
    w = words.astype(np.uint32)
    exponent = (w >> layout.mantissa_bits) & ((1 << layout.exponent_bits) - 1)
    sign = w >> (layout.mantissa_bits + layout.exponent_bits)
    rest = (sign << layout.mantissa_bits) | (w & ((1 << layout.mantissa_bits) - 1))
    return exponent.astype(np.uint32), rest.astype(np.uint32)


def join(exponent: npt.NDArray[np.uint32], rest: npt.NDArray[np.uint32], layout: FloatLayout) -> npt.NDArray[np.uint32]:
    """Inverse of :func:`split`."""
    e = exponent.astype(np.uint32)
    r = rest.astype(np.uint32)
    sign = r >> layout.mantissa_bits
    mantissa = r & ((1 << layout.mantissa_bits) - 1)
    words = (sign << (layout.exponent_bits + layout.mantissa_bits)) | (e << layout.mantissa_bits) | mantissa
    return words.astype(np.uint32)
