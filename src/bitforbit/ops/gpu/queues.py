"""Torch's current stream and torch's memory as a queue for kernels, and emulations in its place for tests."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from bitforbit.cuda import driver, launcher
from bitforbit.cuda.kernel import Argument, DeviceProperties, Kernel, LaunchConfig, Launcher
from bitforbit.cuda.queue import Buffer, Queue
from bitforbit.errors import UsageError

_emulations: list[Queue] = []


class TensorBuffer:
    """A torch tensor as a buffer."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.address: int = tensor.data_ptr()
        self.nbytes: int = tensor.numel()


class TorchQueue:
    """One stream of a CUDA device; memory comes from torch's allocator, as memory of torch's current stream there."""

    def __init__(self, device: torch.device, launcher: Launcher, stream: int) -> None:
        self.device = device
        self.stream = stream
        self._launcher = launcher

    @property
    def properties(self) -> DeviceProperties:
        """Of the device."""
        return self._launcher.properties

    def launch(self, kernel: Kernel, config: LaunchConfig, *arguments: Argument) -> None:
        """Enqueue a kernel; arguments in the order of its parameters."""
        self._launcher.launch(kernel, config, arguments, self.stream)

    def empty(self, nbytes: int) -> TensorBuffer:
        """Uninitialized memory."""
        return TensorBuffer(torch.empty(nbytes, dtype=torch.uint8, device=self.device))

    def zeros(self, nbytes: int) -> TensorBuffer:
        """Memory of zeros."""
        return TensorBuffer(torch.zeros(nbytes, dtype=torch.uint8, device=self.device))

    def upload(self, data: bytes) -> TensorBuffer:
        """A copy of host bytes. Waits for the device."""
        if not data:
            return self.empty(0)
        return TensorBuffer(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device))

    def download(self, buffer: Buffer, nbytes: int | None = None) -> bytes:
        """The (first) bytes of a buffer, after all work enqueued so far: waits for the device."""
        assert isinstance(buffer, TensorBuffer)
        return bytes(buffer.tensor[:nbytes].cpu().numpy().tobytes())


class EmulatedTorchQueue:
    """An emulated queue whose memory lies in torch's CPU tensors."""

    device = torch.device("cpu")

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.identity = id(queue)

    @property
    def properties(self) -> DeviceProperties:
        """Of the emulated device."""
        return self._queue.properties

    def launch(self, kernel: Kernel, config: LaunchConfig, *arguments: Argument) -> None:
        """Run a kernel."""
        self._queue.launch(kernel, config, *arguments)

    def empty(self, nbytes: int) -> TensorBuffer:
        """Uninitialized memory."""
        return TensorBuffer(empty_bytes(nbytes, self.device))

    def zeros(self, nbytes: int) -> TensorBuffer:
        """Memory of zeros."""
        buffer = self.empty(nbytes)
        buffer.tensor.zero_()
        return buffer

    def upload(self, data: bytes) -> TensorBuffer:
        """A copy of host bytes."""
        buffer = self.empty(len(data))
        if data:
            buffer.tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return buffer

    def download(self, buffer: Buffer, nbytes: int | None = None) -> bytes:
        """The (first) bytes of a buffer."""
        assert isinstance(buffer, TensorBuffer)
        return bytes(buffer.tensor[:nbytes].numpy().tobytes())


TensorQueue = TorchQueue | EmulatedTorchQueue


def empty_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """Uninitialized bytes ``[nbytes]`` on a boundary of 256 bytes, which torch keeps by itself on a GPU only."""
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    memory = np.empty(nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return torch.from_numpy(memory[start : start + nbytes])  # its storage offset is 0, as that of fakes


def queue_for(device: torch.device) -> TensorQueue:
    """The queue of a device: torch's current stream on a GPU, the emulation in force on a CPU.

    Raises UsageError for a CPU without emulation and for other devices, GpuUnavailableError.
    """
    if device.type == "cuda":
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        return TorchQueue(device, _launcher(ordinal), torch.cuda.current_stream(device).cuda_stream)
    return emulation(device)


def has_queue(device: torch.device) -> bool:
    """Whether CUDA's kernels are for tensors of this device: a GPU, or a CPU while an emulation is in force."""
    return device.type == "cuda" or (device.type == "cpu" and bool(_emulations))


def cuda_queue(device: torch.device, stream: int) -> TorchQueue:
    """The queue of some stream of a GPU. Raises GpuUnavailableError."""
    return TorchQueue(device, _launcher(device.index), stream)


def queue_at(device: torch.device, stream: int) -> TensorQueue:
    """The queue of a device's stream that is known to be torch's current one; on a CPU, the emulation in force."""
    return emulation(device) if device.type == "cpu" else cuda_queue(device, stream)


def capture_id(device: torch.device, stream: int) -> int:
    """A number for the graph capture that torch's current stream is in, unique in this process; 0 if it is in none."""
    with torch.cuda.device(device) if device.index != torch.cuda.current_device() else nullcontext():
        if not torch.cuda.is_current_stream_capturing():
            return 0
    return int(driver.get().capture_id(stream))


def in_graph_tree(device: torch.device) -> bool:
    """Whether inductor's CUDA graphs are being recorded or warmed up in this thread.

    They refuse memory of theirs that is still in use when a graph ends.
    """
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or device.type != "cuda":
        return False
    manager = trees.get_manager(device.index, create_if_none_exists=False)
    return manager is not None and (manager.in_recording or manager.in_warmup)


def emulation(device: torch.device) -> EmulatedTorchQueue:
    """The emulation in force. Raises UsageError."""
    if device.type == "cpu" and _emulations:
        return EmulatedTorchQueue(_emulations[-1])
    raise UsageError(
        f"expected weights in a GPU's layout to lie on a CUDA device, got {device}; move the module to a GPU, or set "
        'its layout to "planes", which runs on a CPU'
    )


@contextmanager
def emulate(queue: Queue) -> Iterator[None]:
    """Within this context (of all threads), kernels on CPU tensors run through ``queue``. For tests."""
    with _lock:
        _emulations.append(queue)
    try:
        yield
    finally:
        with _lock:
            _emulations.remove(queue)


def _launcher(ordinal: int) -> Launcher:
    return launcher.for_device(ordinal)


def addresses(parts: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Address and length of every part."""
    return tuple((part.data_ptr(), part.numel()) for part in parts)


_lock = threading.Lock()
