"""Tensors that are read when they are used, and of which no more is read than what is used.

vLLM's loaders get whole tensors and cut from them what their process keeps: with ``narrow``, ``chunk``, indices. Here a
cut is only noted, as the shape, strides and offset of a view of the whole; what copies or computes reads the rows and
columns that the view spans. Everything torch can do with a tensor works: what is not a view gets ordinary tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

Range = tuple[int, int]


class Whole:
    """What lazy tensors are views of: ``shape``, ``dtype`` and ``device`` of a tensor, and how to read of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device = torch.device("cpu")

    written: torch.Tensor | None = None
    """The whole tensor, from the first write on: lazy tensors show what was written to others of the same whole."""

    def read(self, rows: Range, columns: Range) -> torch.Tensor:
        """Rows [begin, end) of the first dimension, columns [begin, end) of the last of two or more; contiguous."""
        raise NotImplementedError

    def refuse_write(self) -> None:
        """Raise an error if this is not to be written to."""


class LazyTensor(torch.Tensor):
    """A view of a tensor that is not in memory."""

    _whole: Whole
    _view: torch.Tensor
    """On the meta device, a view of a contiguous tensor of the shape of the whole."""

    # Without this, classes of parameters with a __torch_function__ of their own refuse to work with this one.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(whole: Whole) -> LazyTensor:
        """A lazy tensor that is all of ``whole``."""
        return LazyTensor(whole, torch.empty(whole.shape, dtype=whole.dtype, device="meta"))

    @staticmethod
    def __new__(cls, whole: Whole, view: torch.Tensor) -> LazyTensor:
        """A view of ``whole``: ``view`` is one, on the meta device, of a contiguous tensor of the same shape."""
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, view.shape, view.stride(), view.storage_offset(), dtype=whole.dtype, device=whole.device
        )
        made._whole = whole
        made._view = view
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def read(self) -> torch.Tensor:
        """This part as an ordinary tensor."""
        view, whole = self._view, self._whole
        if whole.written is not None:
            base = whole.written.storage_offset()
            return whole.written.as_strided(view.shape, view.stride(), base + view.storage_offset())
        if view.numel() == 0:
            return torch.empty(view.shape, dtype=whole.dtype, device=whole.device)
        return _cut(whole, view)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view and isinstance(args[0], LazyTensor):
            whole = args[0]._whole
            views = func(args[0]._view, *args[1:], **kwargs)
            if all(view.dtype == whole.dtype for view in tree_leaves(views)):
                return tree_map_only(torch.Tensor, lambda view: cls(whole, view), views)
        if func is torch.ops.aten.copy_.default and args[0].is_meta:
            # So vLLM counts how much a loader would copy: nothing needs to be read for that.
            return func(args[0], args[1]._view, *args[2:], **kwargs)
        for written in _written(func, args):
            whole = written._whole
            if whole.written is None:
                whole.refuse_write()
                whole.written = cls.of(whole).read()
        args, kwargs = tree_map_only(LazyTensor, cls.read, (args, kwargs))
        return func(*args, **kwargs)


def _written(func: Any, args: Sequence[Any]) -> list[LazyTensor]:
    """The lazy tensors among the arguments that the function writes to."""
    arguments = zip(func._schema.arguments, args, strict=False)
    targets = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
    return [value for value in tree_leaves(targets) if isinstance(value, LazyTensor)]


def _cut(whole: Whole, view: torch.Tensor) -> torch.Tensor:
    """Read the rows and columns that a view spans, and take the view of them."""
    row_length = math.prod(whole.shape[1:])
    width = whole.shape[-1] if len(whole.shape) > 1 else 1
    steps = [(size, stride) for size, stride in zip(view.shape, view.stride(), strict=True) if size > 1]
    begin = view.storage_offset()
    end = begin + sum((size - 1) * stride for size, stride in steps)  # the last element, inclusive
    rows = (begin // row_length, end // row_length + 1)
    # Strides that are multiples of the width lead to other rows; the others, added up, through columns of one row.
    column = begin % width
    last = column + sum((size - 1) * stride for size, stride in steps if stride % width)
    columns = (column, last + 1) if last < width else (0, width)
    block = whole.read(rows, columns)
    new_width = columns[1] - columns[0]
    strides = [stride // width * new_width if stride % width == 0 else stride for stride in view.stride()]
    offset = (begin - rows[0] * row_length) // width * new_width + column - columns[0]
    return block.as_strided(view.shape, strides, block.storage_offset() + offset)
