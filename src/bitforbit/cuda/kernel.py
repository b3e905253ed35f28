"""What every kernel has: a source, an entry point, typed parameters, a launch configuration."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Pointer = ctypes.c_void_p
U32 = ctypes.c_uint32
I32 = ctypes.c_int32
U64 = ctypes.c_uint64
F32 = ctypes.c_float

Argument = int | float


@dataclass(frozen=True)
class Kernel:
    """An entry point of a kernel text."""

    name: str
    """The ``extern "C"`` name."""
    source: str
    """File in ``kernels/``."""
    parameters: tuple[type[Any], ...]
    """Types of the parameters: Pointer for every address in device memory, U32, I32, U64, F32."""
    defines: tuple[tuple[str, str], ...] = ()
    """Macros for the compiler; each set of them is a binary of its own."""


@dataclass(frozen=True)
class LaunchConfig:
    """Grid (blocks), block (threads) and dynamic shared memory (bytes) of one launch."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared: int = 0

    @classmethod
    def linear(cls, blocks: int, threads: int, dynamic_shared: int = 0) -> LaunchConfig:
        """One-dimensional grid and block."""
        return cls((blocks, 1, 1), (threads, 1, 1), dynamic_shared)


@dataclass(frozen=True)
class DeviceProperties:
    """What heuristics know of a GPU."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    shared_bytes_per_block: int
    """Largest shared memory of a block, opted in to."""

    @property
    def arch(self) -> str:
        """Target of the compiler: ``sm_90a`` for compute capability 9.0."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


class Launcher(Protocol):
    """Runs kernels on one device. Launches return at once and take effect in the order of their stream."""

    @property
    def properties(self) -> DeviceProperties:
        """Of the device."""
        ...

    def launch(self, kernel: Kernel, config: LaunchConfig, arguments: Sequence[Argument], stream: int) -> None:
        """Enqueue a kernel. Arguments are in the order of its parameters; stream is a ``cudaStream_t``."""
        ...
