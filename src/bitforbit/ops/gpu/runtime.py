"""Runs operators on weights in the layouts of GPUs: decoding, rows by number, products in exact mode."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from bitforbit.errors import UsageError
from bitforbit.ops import stats
from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu import queues, status
from bitforbit.ops.gpu.policy import Policy
from bitforbit.ops.gpu.prefetch import Prefetcher, Successors
from bitforbit.ops.gpu.streams import CudaStreams, OneStream
from bitforbit.ops.gpu.weights import Geometry, Weight
from bitforbit.ops.schema import MODES


class _Settings:
    def __init__(self) -> None:
        self.policy = Policy()


class _Local(threading.local):
    """Prefetchers of one thread by device and stream; those of graph captures apart, with the capture's number."""

    def __init__(self) -> None:
        self.prefetchers: dict[tuple[torch.device, int], tuple[int, Prefetcher]] = {}
        self.captured: dict[tuple[torch.device, int], tuple[int, Prefetcher]] = {}


_settings = _Settings()
_local = _Local()
_successors: dict[torch.device, Successors] = {}


def policy() -> Policy:
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
        _after(device, word)
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
        _after(device, word)
    return out.view(geometry.dtype).view(*ids.shape, geometry.cols)


def linear(geometry: Geometry, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
    """``functional.linear(x, weight, bias)`` with its bits, ``[..., rows]``; both modes decode the weight.

    Raises UsageError, CorruptTensorError.
    """
    if mode not in MODES:
        raise UsageError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    cols, device = geometry.cols, parts[0].device
    if x.dtype != geometry.dtype or x.dim() == 0 or x.shape[-1] != cols or x.device != device:
        raise UsageError(
            f"expected x of dtype {geometry.dtype} and shape [..., {cols}] on {device}, got {x.dtype} and "
            f"{tuple(x.shape)} on {x.device}; cast or move x, or decompress the model and cast that"
        )
    parts, word = _checked(geometry, parts)
    out = _prefetcher(device, word).multiply(
        Weight(geometry, parts), x.numel() // cols, lambda weight: functional.linear(x, weight, bias)
    )
    _after(device, word)
    stats.count("decoded", geometry.matrix_bytes)
    return out


def _checked(geometry: Geometry, parts: Parts) -> tuple[Parts, status.Status]:
    device = parts[0].device
    if device.type != "cuda":
        queues.emulation(device)
    parts = geometry.checked(parts)
    word = status.of(device)
    word.check(str(device))
    return parts, word


def _after(device: torch.device, word: status.Status) -> None:
    if device.type == "cpu":
        word.check(str(device))


def _prefetcher(device: torch.device, word: status.Status) -> Prefetcher:
    """That of this thread, device and stream, or of the graph capture that the stream is in."""
    stream: Any
    if device.type == "cpu":
        queue = queues.emulation(device)
        place, capture, found_in = (device, queue.identity), 0, _local.prefetchers
    else:
        stream = torch.cuda.current_stream(device)
        place, capture = (device, stream.cuda_stream), queues.capture_id(device, stream.cuda_stream)
        # A capture must not wait for side work from before it, so what was decoded ahead by then stays where it is.
        found_in = _local.captured if capture else _local.prefetchers
    number, found = found_in.get(place, (0, None))
    if found is None or number != capture or found.policy is not _settings.policy:
        if found is not None:
            found.discard()
        streams = OneStream(queue) if device.type == "cpu" else CudaStreams(device, stream, capture != 0)
        order = _successors.setdefault(device, Successors())
        found = Prefetcher(streams, order, _settings.policy, word.address)
        found_in[place] = capture, found
    return found
