"""From one layout to another, on the GPU, when a model is loaded or saved. These functions wait for the device."""

from __future__ import annotations

import torch

from bitforbit.cuda.tiles import pack as tiles_pack
from bitforbit.errors import UsageError
from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu import planes, queues, tiles
from bitforbit.ops.gpu.queues import TensorBuffer


def pack_tiles(matrix: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """A BF16 matrix ``[rows, cols]`` in tiles: its four parts; None if they are not smaller. Raises UsageError."""
    if matrix.dtype is not torch.bfloat16 or matrix.dim() != 2 or matrix.numel() == 0:
        raise UsageError(
            f"expected a BF16 matrix that is not empty, got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    queue = queues.queue_for(matrix.device)
    matrix = aligned(matrix.detach())
    return tensors(tiles_pack.pack(queue, matrix.data_ptr(), *matrix.shape))


def planes_to_tiles(
    parts: Parts, kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype
) -> dict[str, torch.Tensor] | None:
    """The tiles of a weight in planes, on its device; None if it is not BF16 or tiles are not smaller than BF16.

    Takes the memory of the decoded weight meanwhile. Raises CorruptTensorError, UsageError.
    """
    if kind != "BF16" or dtype is not torch.bfloat16:
        return None
    matrix = planes.decode(*parts, kind, rows, cols, rows_per_table, dtype, 0, rows)
    return pack_tiles(matrix)
