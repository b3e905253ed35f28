"""A queue on a real GPU, without torch: a stream of its own, poisoned memory with guards behind it."""

from __future__ import annotations

import os
from typing import Any

from bitforbit.cuda import driver, launcher
from bitforbit.cuda.kernel import Argument, DeviceProperties, Kernel, LaunchConfig

POISON = 0xA5
GUARD_BYTES = 0 if os.environ.get("BITFORBIT_TEST_EXACT_ALLOCATIONS") else 4096
"""Under compute-sanitizer there are none: it sees reads and writes beyond an allocation by itself."""


def call(name: str, *arguments: Any) -> Any:
    """A function of the driver; its result."""
    code, *results = getattr(driver.bindings(), name)(*arguments)
    assert code.value == 0, f"{name}: {code.name}"
    return results[0] if results else None


class GpuBuffer:
    """Device memory of exactly its size."""

    def __init__(self, nbytes: int, fill: int = POISON) -> None:
        self.nbytes = nbytes
        self._size = max(1, nbytes + GUARD_BYTES)
        self.address = int(call("cuMemAlloc", self._size))
        call("cuMemsetD8", self.address, POISON, self._size)
        if fill != POISON and nbytes:
            call("cuMemsetD8", self.address, fill, nbytes)

    def read(self, begin: int, nbytes: int) -> bytes:
        """Bytes of it."""
        data = bytearray(nbytes)
        if nbytes:
            call("cuMemcpyDtoH", data, self.address + begin, nbytes)
        return bytes(data)

    def check(self) -> None:
        """Raise AssertionError if something wrote behind the end."""
        assert self.read(self.nbytes, GUARD_BYTES) == bytes([POISON]) * GUARD_BYTES, "a write beyond the buffer"

    def free(self) -> None:
        """Give it back."""
        call("cuMemFree", self.address)


class GpuQueue:
    """A stream of a GPU. Memory lives until the queue is closed."""

    def __init__(self, ordinal: int = 0) -> None:
        self.launches: list[tuple[str, LaunchConfig]] = []
        self._launcher = launcher.for_device(ordinal)
        call("cuCtxPushCurrent", driver.get().primary_context(ordinal))
        self.stream = int(call("cuStreamCreate", 1))  # does not wait for the null stream
        self._buffers: list[GpuBuffer] = []

    def __enter__(self) -> GpuQueue:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.synchronize()
            for buffer in self._buffers:
                buffer.check()
        finally:
            for buffer in self._buffers:
                buffer.free()
            call("cuStreamDestroy", self.stream)
            call("cuCtxPopCurrent")

    @property
    def launcher(self) -> GpuQueue:
        """What has ``launches``, as an emulated launcher has."""
        return self

    @property
    def properties(self) -> DeviceProperties:
        """Of the GPU."""
        return self._launcher.properties

    def synchronize(self) -> None:
        """Wait for all work."""
        call("cuStreamSynchronize", self.stream)

    def launch(self, kernel: Kernel, config: LaunchConfig, *arguments: Argument) -> None:
        """Enqueue a kernel."""
        self.launches.append((kernel.name, config))
        self._launcher.launch(kernel, config, arguments, self.stream)

    def empty(self, nbytes: int) -> GpuBuffer:
        """Memory full of 0xA5."""
        return self._kept(GpuBuffer(nbytes))

    def zeros(self, nbytes: int) -> GpuBuffer:
        """Memory of zeros."""
        return self._kept(GpuBuffer(nbytes, 0))

    def upload(self, data: bytes) -> GpuBuffer:
        """A copy of host bytes."""
        buffer = self.empty(len(data))
        if data:
            call("cuMemcpyHtoD", buffer.address, bytes(data), len(data))
            call("cuCtxSynchronize")
        return buffer

    def download(self, buffer: GpuBuffer, nbytes: int | None = None) -> bytes:
        """The (first) bytes of a buffer, after all work."""
        self.synchronize()
        return buffer.read(0, buffer.nbytes if nbytes is None else nbytes)

    def _kept(self, buffer: GpuBuffer) -> GpuBuffer:
        # Memory is set in the null stream, for which this one does not wait.
        call("cuCtxSynchronize")
        self._buffers.append(buffer)
        return buffer
