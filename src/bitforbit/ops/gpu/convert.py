"""From one layout to another, on the GPU, when a model is loaded or saved. These functions wait for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitforbit.codecs.df11.unit import Df11Unit
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.codecs.planes.layout import BLOCK_ROWS, GROUP, PLANE_WIDTHS, matrix_view
from bitforbit.cuda import df11 as df11_kernels
from bitforbit.cuda.df11 import Df11Geometry
from bitforbit.cuda.planes import encode as planes_encode
from bitforbit.cuda.queue import Buffer
from bitforbit.cuda.tiles import kinds
from bitforbit.cuda.tiles import pack as tiles_pack
from bitforbit.errors import UsageError
from bitforbit.ops.checks import Parts, dtype_name
from bitforbit.ops.gpu import df11, planes, queues, tiles
from bitforbit.ops.gpu.queues import TensorBuffer
from bitforbit.ops.gpu.weights import aligned
from bitforbit.ops.schema import TILES_DTYPES

Tensors = dict[str, torch.Tensor]

_KINDS = {dtype: kind for kind, dtype in TILES_DTYPES.items()}


@dataclass(frozen=True)
class EncodedOnDevice:
    """A tensor in planes on a device, with the members of :class:`bitforbit.codecs.base.EncodedTensor`."""

    codec: str
    codec_version: int
    dtype: str
    shape: tuple[int, ...]
    config: dict[str, int | str]
    parts: Tensors


def pack_tiles(matrix: torch.Tensor) -> Tensors | None:
    """A matrix ``[rows, cols]`` in BF16, FP16 or FP8 (E4M3) in tiles: its four parts; None if they are not smaller.

    Raises UsageError.
    """
    kind = _KINDS.get(matrix.dtype)
    if kind is None or matrix.dim() != 2 or matrix.numel() == 0:
        raise UsageError(
            f"expected a matrix that is not empty, of a dtype among {', '.join(map(str, _KINDS))}, got {matrix.dtype} "
            f"of shape {tuple(matrix.shape)}"
        )
    queue = queues.queue_for(matrix.device)
    matrix = aligned(matrix)
    rows, cols = matrix.shape
    packed = tiles_pack.pack(queue, matrix.data_ptr(), rows, cols, kinds.of(kind))
    return None if packed is None else _tensors(packed)


def planes_to_tiles(
    parts: Parts, kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype
) -> Tensors | None:
    """The tiles of a weight in planes, on its device; None if there are none of its dtype, or if they are not smaller.

    Takes the memory of the decoded weight meanwhile. Raises CorruptTensorError, UsageError.
    """
    if kind != _KINDS.get(dtype):
        return None
    return pack_tiles(planes.decode(*parts, kind, rows, cols, rows_per_table, dtype, 0, rows))


def tiles_to_planes(parts: Parts, rows: int, cols: int, kind: str = "BF16") -> tuple[int, Tensors]:
    """The planes of a weight in tiles, on its device: (rows per table, parts), the bytes that the CPU's encoder gives.

    Takes the memory of the decoded weight meanwhile. Raises CorruptTensorError, UsageError.
    """
    matrix = tiles.decode(*parts, rows, cols, 0, rows, kind)
    queue = queues.queue_for(matrix.device)
    encoded = planes_encode.encode(queue, matrix.data_ptr(), kind, False, rows, cols, always=True)
    assert encoded is not None
    return encoded[0], _tensors(encoded[1])


def encode_planes(tensor: torch.Tensor) -> EncodedOnDevice | None:
    """A float tensor of any shape in planes, on its device.

    The same bytes as the codec ``planes`` gives on a CPU; None where it leaves the tensor plain. Raises UsageError.
    """
    kind = dtype = dtype_name(tensor.dtype)
    if kind not in PLANE_WIDTHS or tensor.numel() == 0:
        return None
    rows, cols = matrix_view(tuple(tensor.shape))
    if min(rows, BLOCK_ROWS) * (cols + GROUP) >= 1 << 32:
        return None  # more positions in a block than its counts can state
    queue = queues.queue_for(tensor.device)
    tensor = aligned(tensor)
    address = tensor.data_ptr()
    wide = kind == "F32" and planes_encode.is_widened_bf16(queue, address, 1, tensor.numel())
    kind = "BF16" if wide else kind
    encoded = planes_encode.encode(queue, address, kind, wide, rows, cols)
    if encoded is None:
        return None
    rows_per_table, parts = encoded
    config: dict[str, int | str] = {"kind": kind, "rows": rows, "cols": cols, "rows_per_table": rows_per_table}
    shape = tuple(tensor.shape)
    return EncodedOnDevice(PlanesCodec.name, PlanesCodec.version, dtype, shape, config, _tensors(parts))


def df11_prepare(
    unit: Df11Unit | Mapping[str, npt.NDArray[np.uint8]], device: torch.device
) -> tuple[Df11Geometry, Tensors]:
    """A unit of a DFloat11 file, made ready for kernels: its geometry and its four parts on a device.

    ``unit``: itself, or its luts, encoded_exponent, sign_mantissa, output_positions and gaps by name.
    The device may be a CPU, from which the parts move to a GPU later. Raises Df11FormatError and its kinds.
    """
    arrays: Mapping[str, npt.NDArray[Any]] = unit.tensors() if isinstance(unit, Df11Unit) else unit
    names = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
    geometry, host = df11_kernels.prepare(*(arrays[name] for name in names))
    parts = {name: _upload(part, device) for name, part in host.items()}
    df11.remember(parts["index"], geometry)
    return geometry, parts


def _upload(part: npt.NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    tensor = queues.empty_bytes(part.nbytes, device)
    host = part if part.flags.writeable else part.copy()  # arrays of files are not, which torch warns of
    return tensor.copy_(torch.from_numpy(host))


def _tensors(buffers: Mapping[str, Buffer]) -> Tensors:
    found = {}
    for name, buffer in buffers.items():
        assert isinstance(buffer, TensorBuffer)
        found[name] = buffer.tensor[: buffer.nbytes]
    return found
