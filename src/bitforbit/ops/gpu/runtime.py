"""Runs operators on weights in the layouts of GPUs: decoding, rows by number, products with decoded weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from bitforbit.errors import UsageError
from bitforbit.ops import stats
from bitforbit.ops.checks import Parts, multiplies
from bitforbit.ops.gpu import queues, slices, status, volatile
from bitforbit.ops.gpu.policy import Policy
from bitforbit.ops.gpu.prefetch import Prefetcher, Successors
from bitforbit.ops.gpu.streams import CudaStreams, OneStream, Streams
from bitforbit.ops.gpu.weights import Geometry, RowSlice, Weight
from bitforbit.ops.schema import MODES


class _Settings:
    def __init__(self) -> None:
        self.policy = Policy()


class _Local(threading.local):
    """Prefetchers of one thread by device and stream; those of graph captures apart, with the capture's number."""

    def __init__(self) -> None:
        self.prefetchers: dict[tuple[torch.device, int], tuple[int, Prefetcher]] = {}
        self.captured: dict[tuple[torch.device, int], tuple[int, Prefetcher]] = {}
        self.captured_sides: dict[torch.device, Any] = {}
        """One side stream for all captures: torch has few streams, and gives the same ones again and again."""


_settings = _Settings()
_local = _Local()
_successors: dict[torch.device, Successors] = {}


def current_policy() -> Policy:
    """How decoding is scheduled."""
    return _settings.policy


@contextmanager
def use_policy(policy: Policy) -> Iterator[None]:
    """Within this context (of all threads) decoding is scheduled so."""
    before, _settings.policy = _settings.policy, policy
    try:
        yield
    finally:
        _settings.policy = before


def clear() -> None:
    """Forget the order of weights and, in this thread, free what was decoded ahead."""
    for _, prefetcher in _local.prefetchers.values():
        prefetcher.discard()
    for _, prefetcher in _local.captured.values():
        prefetcher.abandon()
    _local.prefetchers.clear()
    _local.captured.clear()
    _successors.clear()


def check_status(device: torch.device) -> None:
    """Raise what kernels have found wrong on a device, of the work that has ended: IndexError, CorruptTensorError."""
    status.of(device).check(str(device))


def decode(geometry: Geometry, parts: Parts, begin: int, end: int) -> torch.Tensor:
    """Rows [begin, end), ``[end - begin, cols]``. Raises UsageError, CorruptTensorError."""
    if not 0 <= begin <= end <= geometry.rows:
        raise UsageError(f"expected a range of rows within 0 to {geometry.rows}, got {begin} to {end}")
    device = parts[0].device
    parts, word = _checked(geometry, parts)
    queue = queues.queue_for(device)
    row_bytes = geometry.cols * int(geometry.dtype.itemsize)
    out = queues.empty_bytes((end - begin) * row_bytes, device)
    workspace = queues.empty_bytes(geometry.workspace_bytes, device)
    if begin < end:
        geometry.decode(queue, parts, begin, end, out.data_ptr(), workspace.data_ptr(), word.address)
        after(device, word)
    return out.view(geometry.dtype).view(end - begin, geometry.cols)


def embedding(geometry: Geometry, ids: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Rows by number, ``[*ids.shape, cols]``.

    An id outside gives a row of zeros and an IndexError of a later call (of this one in an emulation). Raises
    UsageError, CorruptTensorError.
    """
    device = parts[0].device
    if ids.dtype not in (torch.int64, torch.int32) or ids.device != device:
        raise UsageError(f"expected ids of dtype int64 or int32 on {device}, got {ids.dtype} on {ids.device}")
    parts, word = _checked(geometry, parts)
    queue = queues.queue_for(device)
    ids = ids.contiguous()
    out = queues.empty_bytes(ids.numel() * geometry.cols * int(geometry.dtype.itemsize), device)
    workspace = queues.empty_bytes(geometry.workspace_bytes, device)
    if ids.numel():
        geometry.look_up(queue, parts, ids, out.data_ptr(), workspace.data_ptr(), word.address)
        after(device, word)
    return out.view(geometry.dtype).view(*ids.shape, geometry.cols)


def linear(geometry: Geometry, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
    """``functional.linear(x, weight, bias)`` with its bits, ``[..., rows]``, from the decoded weight in both modes.

    A weight in FP8 is ``weight.to(x.dtype)`` there, for x in BF16, FP16 or FP32.

    Raises UsageError, CorruptTensorError.
    """
    if mode not in MODES:
        raise UsageError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    cols, device = geometry.cols, parts[0].device
    check_input(x, cols, geometry.dtype, device)
    word = checked_status(device)
    prefetcher = _prefetcher(device, word)
    tokens, alone, apart = x.numel() // cols, queues.in_graph_tree(device), volatile.holds(parts[0])

    def multiply(part: Geometry, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        def product(matrix: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, matrix.to(x.dtype), bias)

        weight = Weight(part, parts)
        if apart:
            return prefetcher.multiply_apart(weight, product)
        return prefetcher.multiply(weight, tokens, product, alone)

    step = _rows_of_slice(geometry, x, bias, prefetcher)
    if step == geometry.rows:
        out = multiply(geometry, x, bias)
    else:
        out = slices.linear(
            x, bias, geometry.rows, step,
            lambda begin, end, x, bias: multiply(RowSlice(end - begin, cols, geometry, begin), x, bias),
        )  # fmt: skip
    after(device, word)
    stats.count("decoded", geometry.matrix_bytes)
    return out


def check_input(x: torch.Tensor, cols: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise UsageError for an x that a matrix of ``cols`` columns cannot be multiplied by."""
    if not multiplies(x.dtype, dtype) or x.dim() == 0 or x.shape[-1] != cols or x.device != device:
        raise UsageError(
            f"expected x of dtype {dtype} and shape [..., {cols}] on {device}, got {x.dtype} and "
            f"{tuple(x.shape)} on {x.device}; cast or move x, or decompress the model and cast that"
        )


def _rows_of_slice(geometry: Geometry, x: torch.Tensor, bias: torch.Tensor | None, prefetcher: Prefetcher) -> int:
    """Rows of the slices in which a product is computed; all rows if it is not sliced."""
    limit = prefetcher.policy.slice_bytes
    if limit is None or geometry.matrix_bytes <= limit:
        return geometry.rows
    step = slices.rows_of_slice(geometry.rows, geometry.matrix_bytes // geometry.rows, limit)
    if step < geometry.rows and slices.allowed(x, bias, geometry.rows, step, not prefetcher.capturing):
        return step
    return geometry.rows


def _checked(geometry: Geometry, parts: Parts) -> tuple[Parts, status.Status]:
    word = checked_status(parts[0].device)
    return geometry.checked(parts), word


def checked_status(device: torch.device) -> status.Status:
    """The status of a device that has kernels; raises what has been found so far, UsageError."""
    if device.type != "cuda":
        queues.emulation(device)
    word = status.of(device)
    word.check(str(device))
    return word


def after(device: torch.device, word: status.Status) -> None:
    """Raise what an emulated launch has found; on a GPU a later call does."""
    if device.type == "cpu":
        word.check(str(device))


@dataclass(frozen=True)
class Place:
    """Where work is enqueued: what may not be shared between two of them is kept apart for each."""

    device: torch.device
    stream: int
    """Torch's current stream there."""
    capture: int
    """The number of the graph capture that it is in; 0: none."""


def current_place(device: torch.device) -> Place:
    """The place of this thread's work on a device. Raises UsageError for a CPU without emulation."""
    if device.type == "cpu":
        return Place(device, queues.emulation(device).identity, 0)
    stream = torch.cuda.current_stream(device).cuda_stream
    return Place(device, stream, queues.capture_id(device, stream))


def pass_by(place: Place, parts: Parts | None = None) -> None:
    """A product at this place decodes nothing: what was decoded ahead for its stead is freed, and not decoded again.

    With its ``parts`` that is said of this weight alone, without them of all.
    """
    found = (_local.captured if place.capture else _local.prefetchers).get((place.device, place.stream))
    if found is not None and found[0] == place.capture:
        found[1].pass_by(parts)


def _prefetcher(device: torch.device, word: status.Status) -> Prefetcher:
    """That of this thread, device and stream, or of the graph capture that the stream is in."""
    place = current_place(device)
    key, capture = (device, place.stream), place.capture
    # A capture must not wait for side work from before it, so what was decoded ahead by then stays where it is.
    found_in = _local.captured if capture else _local.prefetchers
    number, found = found_in.get(key, (0, None))
    if found is None or number != capture or found.policy is not _settings.policy:
        if found is not None and capture:
            found.abandon()
        elif found is not None:
            found.discard()
        order = _successors.setdefault(device, Successors())
        found = Prefetcher(_streams(device, capture != 0), order, _settings.policy, word.address)
        found_in[key] = capture, found
    return found


def _streams(device: torch.device, capturing: bool) -> Streams:
    if device.type == "cpu":
        return OneStream(queues.emulation(device))
    return _cuda_streams(device, torch.cuda.current_stream(device), capturing)


def _cuda_streams(device: torch.device, stream: Any, capturing: bool) -> CudaStreams:
    if not capturing:
        return CudaStreams(device, stream, torch.cuda.Stream(device), capturing)
    if device not in _local.captured_sides:
        _local.captured_sides[device] = torch.cuda.Stream(device)
    return CudaStreams(device, stream, _local.captured_sides[device], capturing)
