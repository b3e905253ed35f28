"""Indices of tensors that are not in memory: integers, slices and ``...``, as numpy has them."""

from __future__ import annotations

from types import EllipsisType
from typing import SupportsIndex

from bitforbit.archive.ranges import Range
from bitforbit.errors import SliceIndexError, UsageError

Index = SupportsIndex | slice | EllipsisType


def normalized(index: Index | tuple[Index, ...], shape: tuple[int, ...]) -> list[int | slice]:
    """One integer (not negative) or slice (with its numbers, within the shape) per dimension.

    Raises SliceIndexError for integers outside, UsageError for anything that is none of these.
    """
    given = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, item in enumerate(given) if item is Ellipsis]
    missing = len(shape) - (len(given) - len(dots))
    if len(dots) > 1 or missing < 0:
        raise UsageError(f"expected at most {len(shape)} indices and one '...', got {index!r}")
    at = dots[0] if dots else len(given)
    given[at : at + 1] = [slice(None)] * missing
    return [_one(item, length, index) for item, length in zip(given, shape, strict=True)]


def _one(item: Index, length: int, index: object) -> int | slice:
    if isinstance(item, slice):
        begin, end, step = item.indices(length)
        if step < 1:
            raise UsageError(f"expected slices with a positive step, got {index!r}; read the part, then turn it")
        return slice(begin, max(begin, end), step)
    if isinstance(item, bool) or not isinstance(item, SupportsIndex):
        raise UsageError(f"expected integers, slices and '...', got {index!r}; read rows, then choose among them")
    number = item.__index__()
    if not -length <= number < length:
        raise SliceIndexError(f"expected an index within {-length} to {length - 1}, got {number}")
    return number % length


def cover(step: int | slice) -> Range:
    """The smallest range that holds an integer or a slice."""
    if isinstance(step, int):
        return step, step + 1
    chosen = range(step.start, step.stop, step.step)
    return (chosen[0], chosen[-1] + 1) if chosen else (step.start, step.start)


def moved(step: int | slice, begin: int) -> int | slice:
    """The same elements, counted from ``begin``."""
    return step - begin if isinstance(step, int) else slice(step.start - begin, step.stop - begin, step.step)
