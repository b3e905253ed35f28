"""Arrays of numpy and of torch as runs of bytes, and back.

torch is never imported here: whoever hands over a torch tensor has imported it, so it is found in ``sys.modules``.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.errors import MissingDependencyError, UnsupportedDtypeError, UsageError

Bytes = npt.NDArray[np.uint8]


def library_of(array: object) -> str:
    """``"numpy"`` (its scalars included) or ``"torch"``. Raises UsageError for anything else, also masked arrays."""
    if isinstance(array, np.ndarray | np.generic) and not isinstance(array, np.ma.MaskedArray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch"
    raise UsageError(f"expected a numpy array or a torch tensor, got {type(array).__name__}; convert it first")


def to_bytes(array: Any) -> tuple[Bytes, str, tuple[int, ...]]:
    """Row-major bytes ``[nbytes]``, safetensors dtype and shape of an array; the bytes are a view where possible.

    Raises UsageError for a tensor that is not a plain one in CPU memory, UnsupportedDtypeError.
    """
    if library_of(array) == "numpy":
        dtype = dtypes.from_numpy(array.dtype)
        return _flat_numpy(np.ascontiguousarray(array)), dtype, array.shape
    tensor = _checked_tensor(array).detach().resolve_conj().resolve_neg().contiguous()
    return _flat_torch(tensor), _torch_dtype(array), tuple(array.shape)


def empty(library: str, dtype: str, shape: tuple[int, ...]) -> Any:
    """Uninitialized array. Raises MissingDependencyError if it is torch's turn and nobody has imported torch."""
    if library != "torch":
        from bitforbit.cpu import planes as kernels

        return kernels.empty(math.prod(shape) * dtypes.bits(dtype) // 8).view(dtypes.to_numpy(dtype)).reshape(shape)
    torch = sys.modules.get("torch")
    if torch is None:
        raise MissingDependencyError(
            "this array was a torch tensor, and torch is not imported: import torch, or decode into a numpy array "
            "given as out"
        )
    name = next(name for name, ours in dtypes.ARRAY_NAMES.items() if ours == dtype)
    return torch.empty(shape, dtype=getattr(torch, name))


def writable_bytes(array: Any, dtype: str, shape: tuple[int, ...]) -> Bytes:
    """Bytes of an array to be filled. Raises UsageError if its dtype, shape or memory is not what is needed."""
    if library_of(array) == "numpy":
        got, ready = dtypes.from_numpy(array.dtype), array.flags.c_contiguous and array.flags.writeable
    else:
        got = _torch_dtype(_checked_tensor(array))
        ready = array.is_contiguous() and not array.is_conj() and not array.is_neg()
    if isinstance(array, np.generic):
        raise UsageError("expected out to be an array, got a numpy scalar")
    if (got, tuple(array.shape)) != (dtype, shape):
        raise UsageError(f"expected out to be {dtype} of shape {shape}, got {got} of shape {tuple(array.shape)}")
    if not ready:
        raise UsageError("expected out to be contiguous and writable")
    return _flat_numpy(array) if library_of(array) == "numpy" else _flat_torch(array.detach())


def _flat_numpy(array: npt.NDArray[Any]) -> Bytes:
    return np.asarray(array).reshape(-1).view(np.uint8)


def _flat_torch(tensor: Any) -> Bytes:
    flat: Bytes = tensor.reshape(-1).view(sys.modules["torch"].uint8).numpy()
    return flat


def _checked_tensor(tensor: Any) -> Any:
    if tensor.device.type != "cpu":
        raise UsageError(f"expected a tensor in CPU memory, got one on {tensor.device}; move it with .cpu()")
    if tensor.layout is not sys.modules["torch"].strided or tensor.is_quantized:
        raise UsageError(f"expected a dense tensor, got layout {tensor.layout}; convert it with .to_dense()")
    return tensor


def _torch_dtype(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in dtypes.ARRAY_NAMES:
        raise UnsupportedDtypeError(
            f"expected a dtype among {', '.join(dtypes.ARRAY_NAMES)}, got {tensor.dtype}; convert the tensor first"
        )
    return dtypes.ARRAY_NAMES[name]
