"""What the functions of this package work through: a stream of one device, and memory there."""

from __future__ import annotations

from typing import Protocol

from bitforbit.cuda.kernel import Argument, DeviceProperties, Kernel, LaunchConfig


class Buffer(Protocol):
    """Device memory that lives as long as this object."""

    @property
    def address(self) -> int:
        """Address in device memory, a multiple of 256."""
        ...

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        ...


class Queue(Protocol):
    """One stream of one device. Work takes effect in the order in which it was enqueued."""

    @property
    def properties(self) -> DeviceProperties:
        """Of the device."""
        ...

    def launch(self, kernel: Kernel, config: LaunchConfig, *arguments: Argument) -> None:
        """Enqueue a kernel; arguments in the order of its parameters. Returns at once."""
        ...

    def empty(self, nbytes: int) -> Buffer:
        """Uninitialized memory."""
        ...

    def zeros(self, nbytes: int) -> Buffer:
        """Memory of zeros."""
        ...

    def upload(self, data: bytes) -> Buffer:
        """A copy of host bytes. For preparations: may wait for the device."""
        ...

    def download(self, buffer: Buffer, nbytes: int | None = None) -> bytes:
        """The (first) bytes of a buffer, after all work enqueued so far: waits for the device."""
        ...
