"""A launcher that runs kernels on the CPU: their texts, compiled with the host's C++ compiler against ``shim.hpp``.

Addresses are those of host memory (numpy arrays, CPU tensors); streams are ignored, a launch returns when it is done.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitforbit.cuda import sources
from bitforbit.cuda.kernel import Argument, DeviceProperties, Kernel, LaunchConfig

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "cuda_shim"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-fno-gnu-unique", "-pthread", "-w")
HOPPER = DeviceProperties("emulated", (9, 0), 4, 1 << 20, 227 << 10)


class EmulationError(AssertionError):
    """A kernel did what no kernel may: deadlock, a wrong mask, a misaligned access, ..."""


class EmulatedLauncher:
    """Runs kernels with lanes in the order of a seed."""

    def __init__(self, seed: int = 0, os_threads: int = 2, properties: DeviceProperties = HOPPER) -> None:
        self.seed = seed
        self.os_threads = os_threads
        self.properties = properties
        self.launches: list[tuple[str, LaunchConfig]] = []

    def launch(self, kernel: Kernel, config: LaunchConfig, arguments: Sequence[Argument], stream: int = 0) -> None:
        """Run a kernel to its end. Raises EmulationError."""
        self.launches.append((kernel.name, config))
        code = library(kernel.source, kernel.defines)
        _check_parameters(code, kernel)
        if len(arguments) != len(kernel.parameters):
            raise EmulationError(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(arguments)}")
        values = [kind(argument) for kind, argument in zip(kernel.parameters, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        message = ctypes.create_string_buffer(500)
        failed = code.shim_launch(
            kernel.name.encode(), (ctypes.c_uint * 3)(*config.grid), (ctypes.c_uint * 3)(*config.block),
            ctypes.c_size_t(config.dynamic_shared), pointers, self.seed, self.os_threads, message, len(message),
        )  # fmt: skip
        if failed:
            raise EmulationError(f"{kernel.name}: {message.value.decode()}")


class HostBuffer:
    """Host memory on a 256-byte boundary, of exactly its size as far as the sanitizers are concerned."""

    def __init__(self, nbytes: int) -> None:
        self._memory = np.full(nbytes + 256, 0xA5, np.uint8)
        start = -self._memory.ctypes.data % 256
        self.array = self._memory[start : start + nbytes]
        self.address = self._memory.ctypes.data + start
        self.nbytes = nbytes


class EmulatedQueue:
    """The emulation as a stream with memory."""

    def __init__(self, launcher: EmulatedLauncher | None = None) -> None:
        self.launcher = launcher or EmulatedLauncher()

    @property
    def properties(self) -> DeviceProperties:
        """Of the emulated device."""
        return self.launcher.properties

    def launch(self, kernel: Kernel, config: LaunchConfig, *arguments: Argument) -> None:
        """Run a kernel to its end. Raises EmulationError."""
        self.launcher.launch(kernel, config, arguments)

    def empty(self, nbytes: int) -> HostBuffer:
        """Memory filled with garbage."""
        return HostBuffer(nbytes)

    def zeros(self, nbytes: int) -> HostBuffer:
        """Memory of zeros."""
        buffer = HostBuffer(nbytes)
        buffer.array[:] = 0
        return buffer

    def upload(self, data: bytes) -> HostBuffer:
        """A copy of bytes."""
        buffer = HostBuffer(len(data))
        buffer.array[:] = np.frombuffer(data, np.uint8)
        return buffer

    def download(self, buffer: HostBuffer, nbytes: int | None = None) -> bytes:
        """The (first) bytes of a buffer."""
        return bytes(buffer.array[:nbytes].tobytes())


def _check_parameters(code: ctypes.CDLL, kernel: Kernel) -> None:
    sizes = (ctypes.c_size_t * 64)()
    count = code.shim_parameters(kernel.name.encode(), sizes)
    declared = [ctypes.sizeof(kind) for kind in kernel.parameters]
    if list(sizes[:count] if count >= 0 else ()) != declared:
        raise EmulationError(
            f"{kernel.name}: the text has parameters of {sizes[: max(count, 0)]} bytes, not {declared}"
        )


@functools.cache
def library(source: str, defines: tuple[tuple[str, str], ...] = ()) -> ctypes.CDLL:
    """A kernel text as a shared library; built once per text."""
    text = "".join(f"#define {name} {value}\n" for name, value in defines) + sources.text(source)
    names = sources.entry_points(source)
    body = '#include "shim.hpp"\n' + text + "\n" + "".join(f"SHIM_KERNEL({name})\n" for name in names)
    digest = hashlib.sha256((HERE / "shim.hpp").read_bytes() + body.encode() + repr(FLAGS).encode()).hexdigest()[:20]
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / f"{Path(source).stem}-{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            (Path(folder) / "kernel.cpp").write_text(body)
            compiler = os.environ.get("CXX", "g++")
            command = [compiler, *FLAGS, "-I", str(HERE), "-o", f"{folder}/kernel.so", f"{folder}/kernel.cpp"]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            if built.returncode != 0:
                raise EmulationError(f"{source} does not compile:\n{built.stderr[:4000]}")
            Path(folder, "kernel.so").rename(path)
    return ctypes.CDLL(str(path))
