"""The operators on ``planes``, the layout of files, for tensors on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from bitforbit.codecs.planes.layout import Layout
from bitforbit.cuda.planes import decode as kernels
from bitforbit.cuda.queue import Queue
from bitforbit.ops import checks
from bitforbit.ops.checks import PARTS, Parts
from bitforbit.ops.gpu import runtime
from bitforbit.ops.gpu.queues import addresses
from bitforbit.ops.gpu.weights import Geometry, checked_parts
from bitforbit.ops.schema import LIBRARY


def register() -> None:
    """Register the kernels; once per process."""
    LIBRARY.impl("decode", decode, "CUDA")
    LIBRARY.impl("embedding", embedding, "CUDA")
    LIBRARY.impl("linear", linear, "CUDA")


@dataclass(frozen=True)
class Planes(Geometry):
    """A matrix in planes."""

    kind: str
    rows_per_table: int
    of: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoded matrix."""
        return self.of

    @cached_property
    def layout(self) -> Layout:
        """Sizes of the parts."""
        return checks.layout(self.kind, self.rows, self.cols, self.rows_per_table, self.of)

    @property
    def wide(self) -> bool:
        """Whether it is F32 coded as BF16."""
        return self.kind == "BF16" and self.of is torch.float32

    @cached_property
    def workspace_bytes(self) -> int:
        """See Geometry."""
        return kernels.workspace_bytes(self.layout)

    def checked(self, parts: Parts) -> Parts:
        """See Geometry."""
        return checked_parts(PARTS, parts, kernels.ALIGNMENT)

    def decode(self, queue: Queue, parts: Parts, begin: int, end: int, out: int, workspace: int, status: int) -> None:
        """See Geometry."""
        # The workspace is filled anew each time: parts may have changed, and filling it is little beside the decoding.
        kernels.prepare(queue, addresses(parts), self.layout, workspace, status)
        kernels.decode(queue, addresses(parts), self.layout, self.wide, begin, end, out, workspace, status)

    def look_up(self, queue: Queue, parts: Parts, ids: torch.Tensor, out: int, workspace: int, status: int) -> None:
        """See Geometry."""
        kernels.prepare(queue, addresses(parts), self.layout, workspace, status)
        kernels.rows(
            queue, addresses(parts), self.layout, self.wide, ids.data_ptr(), ids.element_size(), ids.numel(), out,
            workspace, status,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def geometry(kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype) -> Planes:
    """The geometry of a weight. Raises CorruptTensorError if these numbers describe none."""
    checks.layout(kind, rows, cols, rows_per_table, dtype)
    return Planes(rows, cols, kind, rows_per_table, dtype)


def decode(
    code: torch.Tensor, digits: torch.Tensor, sign_mantissa: torch.Tensor, tails: torch.Tensor,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype, begin: int, end: int,
) -> torch.Tensor:  # fmt: skip
    """Rows [begin, end) of a weight, ``[end - begin, cols]``. Raises UsageError, CorruptTensorError."""
    of = geometry(kind, rows, cols, rows_per_table, dtype)
    return runtime.decode(of, (code, digits, sign_mantissa, tails), begin, end)


def embedding(
    ids: torch.Tensor, code: torch.Tensor, digits: torch.Tensor, sign_mantissa: torch.Tensor, tails: torch.Tensor,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Rows by number, ``[*ids.shape, cols]``. See :func:`bitforbit.ops.gpu.runtime.embedding`."""
    of = geometry(kind, rows, cols, rows_per_table, dtype)
    return runtime.embedding(of, ids, (code, digits, sign_mantissa, tails))


def linear(
    x: torch.Tensor, code: torch.Tensor, digits: torch.Tensor, sign_mantissa: torch.Tensor, tails: torch.Tensor,
    bias: torch.Tensor | None, kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype, mode: str,
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T + bias``, ``[..., rows]``, with torch's own bits. Raises UsageError, CorruptTensorError."""
    of = geometry(kind, rows, cols, rows_per_table, dtype)
    return runtime.linear(of, x, (code, digits, sign_mantissa, tails), bias, mode)
