"""Runs kernels on the CPU: their texts, compiled with the host's C++ compiler against ``shim.hpp``.

Addresses are those of host memory (numpy arrays, CPU tensors); streams are ignored, a launch returns when it is done.

What a test of a kernel's function looks like. ``run`` is called with one queue after the other, which differ in the
order of lanes, warps and blocks, look for races on shared memory, and run every launch under AddressSanitizer; all must
give the same result::

    from cuda_shim.emulation import run_everywhere

    def run(queue):
        given, out = queue.upload(data), queue.empty(nbytes)  # keep what launches use, else it is freed
        decode(queue, [(given.address, given.nbytes)], layout, 0, rows, out.address)
        return queue.download(out)

    assert run_everywhere(run) == expected

Or, with pytest, ``@pytest.mark.parametrize("mode", MODES)`` and ``queue(mode)``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bitforbit.cuda.kernel import F32, Argument, DeviceProperties, Kernel, LaunchConfig, Pointer
from cuda_shim.build import EmulationError, binary, library

__all__ = [
    "HOPPER",
    "MODES",
    "CheckedQueue",
    "EmulatedLauncher",
    "EmulatedQueue",
    "EmulationError",
    "HostBuffer",
    "check_memory",
    "library",
    "queue",
    "run_all_seeds",
    "run_everywhere",
]

HOPPER = DeviceProperties("emulated", (9, 0), 4, 1 << 20, 227 << 10)
SEEDS = (0, 1, 6, 11)
MODES = (*(f"seed {seed}" for seed in SEEDS), "races", "memory")

Result = TypeVar("Result")
Memory = tuple[int, npt.NDArray[np.uint8]]
"""Address (numpy tells none of an empty array) and bytes."""


class EmulatedLauncher:
    """Runs kernels with lanes in the order of a seed; with ``races``, looking for races on shared memory.

    ``uninitialized`` reports reads of shared memory that no thread of the block has written, too: off, because a kernel
    may read such bytes and drop them. What it must not do is use them: they differ between seeds.
    ``mma_rounds_each``: tensor cores add in FP32, product by product, instead of exactly with one rounding. Devices do
    neither exactly: a result that must be the device's cannot be had here.
    """

    def __init__(
        self,
        seed: int = 0,
        os_threads: int = 2,
        properties: DeviceProperties = HOPPER,
        *,
        races: bool = False,
        uninitialized: bool = False,
        mma_rounds_each: bool = False,
    ) -> None:
        self.seed = seed
        self.os_threads = os_threads
        self.properties = properties
        self.flavour = "races" if races or uninitialized else "plain"
        self.uninitialized = uninitialized
        self.mma_rounds_each = mma_rounds_each
        self.launches: list[tuple[str, LaunchConfig]] = []

    def launch(self, kernel: Kernel, config: LaunchConfig, arguments: Sequence[Argument], stream: int = 0) -> None:
        """Run a kernel to its end. Raises EmulationError."""
        self.launches.append((kernel.name, config))
        check_launch(kernel, config, arguments, self.properties)
        code = library(kernel.source, kernel.defines, self.flavour)
        check_parameters(code, kernel)
        code.shim_report_uninitialized(self.uninitialized)
        code.shim_mma_rounds_each(self.mma_rounds_each)
        values = [kind(argument) for kind, argument in zip(kernel.parameters, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        message = ctypes.create_string_buffer(2000)
        failed = code.shim_launch(
            kernel.name.encode(), (ctypes.c_uint * 3)(*config.grid), (ctypes.c_uint * 3)(*config.block),
            ctypes.c_size_t(config.dynamic_shared), pointers, self.seed, self.os_threads, message, len(message),
        )  # fmt: skip
        if failed:
            raise EmulationError(f"{kernel.name}: {message.value.decode()}")


class HostBuffer:
    """Host memory on a 256-byte boundary, filled with garbage."""

    def __init__(self, nbytes: int) -> None:
        self._memory = np.full(nbytes + 512, 0xA5, np.uint8)
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
        buffer = self.empty(nbytes)
        buffer.array[:] = 0
        return buffer

    def upload(self, data: bytes) -> HostBuffer:
        """A copy of bytes."""
        buffer = self.empty(len(data))
        buffer.array[:] = np.frombuffer(data, np.uint8)
        return buffer

    def download(self, buffer: HostBuffer, nbytes: int | None = None) -> bytes:
        """The (first) bytes of a buffer."""
        return bytes(buffer.array[:nbytes].tobytes())


class CheckedQueue(EmulatedQueue):
    """Runs every launch in a process of its own under AddressSanitizer and UndefinedBehaviorSanitizer.

    Kernels see copies of the buffers that their pointers lie in, each of exactly its size; so pointers must lie in
    buffers made by this queue, or lent to it.
    """

    def __init__(self, seed: int = 0, properties: DeviceProperties = HOPPER) -> None:
        super().__init__(EmulatedLauncher(seed, 1, properties))
        self._buffers: weakref.WeakSet[HostBuffer] = weakref.WeakSet()
        self._lent: list[Memory] = []
        self._tables: set[int] = set()

    def empty(self, nbytes: int) -> HostBuffer:
        """Memory filled with garbage."""
        buffer = super().empty(nbytes)
        self._buffers.add(buffer)
        return buffer

    def lend(self, array: npt.NDArray[Any]) -> int:
        """Let kernels use a contiguous array, which the queue keeps alive; returns its address."""
        self._lent.append((array.ctypes.data, array.reshape(-1).view(np.uint8)))
        return array.ctypes.data

    def relocate(self, address: int) -> None:
        """The buffer there is a table: its u64 words that are addresses in other buffers follow their copies."""
        self._tables.add(address)

    def launch(self, kernel: Kernel, config: LaunchConfig, *arguments: Argument) -> None:
        """Run a kernel to its end. Raises EmulationError, with the sanitizer's report."""
        self.launcher.launches.append((kernel.name, config))
        memory = [(buffer.address, buffer.array) for buffer in self._buffers] + self._lent
        used: list[Memory] = []
        places: list[tuple[int, int]] = []
        check_launch(kernel, config, arguments, self.properties)
        for number, (kind, argument) in enumerate(zip(kernel.parameters, arguments, strict=True)):
            if kind is not Pointer or argument == 0:
                places.append((_NO_BUFFER, _bits(kind, argument)))
                continue
            found = _around(memory, int(argument))
            if found is None:
                raise EmulationError(
                    f"{kernel.name}, argument {number}: address {int(argument):#x} lies in no buffer of this queue; "
                    "make it with the queue's empty, zeros or upload and keep it, or lend it"
                )
            places.append((_index(used, found), int(argument) - found[0]))
        words = [
            (table, 8 * at, found, word)
            for table, (begin, array) in enumerate(list(used))
            if begin in self._tables
            for at, word in enumerate(array.view(np.uint64).tolist())
            if (found := _around(memory, word)) is not None
        ]
        links = [(table, at, _index(used, found), word - found[0]) for table, at, found, word in words]
        _run_case(kernel, config, used, places, links, self.launcher.seed)


def check_memory(
    kernel: Kernel, config: LaunchConfig, arguments: Sequence[npt.NDArray[Any] | int | float], seed: int = 0
) -> list[npt.NDArray[Any]]:
    """One launch under AddressSanitizer and UndefinedBehaviorSanitizer; arrays stand for pointers to their bytes.

    Returns copies of the arrays as the kernel left them. Raises EmulationError with the sanitizer's report.
    """
    queue = CheckedQueue(seed)
    copies = [np.array(argument, order="C") for argument in arguments if isinstance(argument, np.ndarray)]
    addresses = iter([queue.lend(array) for array in copies])
    queue.launch(kernel, config, *(next(addresses) if isinstance(a, np.ndarray) else a for a in arguments))
    return copies


def queue(mode: str) -> EmulatedQueue:
    """The queue of one of MODES."""
    if mode == "memory":
        return CheckedQueue(seed=6)
    if mode == "races":
        return EmulatedQueue(EmulatedLauncher(races=True))
    return EmulatedQueue(EmulatedLauncher(int(mode.removeprefix("seed "))))


def run_everywhere(function: Callable[[EmulatedQueue], Result], modes: Sequence[str] = MODES) -> Result:
    """Call a function with a queue of every mode; the results (bytes, arrays, and what holds them) must be equal."""
    results = [function(queue(mode)) for mode in modes]
    for mode, result in zip(modes, results, strict=True):
        if _plain(result) != _plain(results[0]):
            raise EmulationError(f"the result with {mode} is not that with {modes[0]}: a barrier or a fence is missing")
    return results[0]


def run_all_seeds(function: Callable[[EmulatedQueue], Result], seeds: Sequence[int] = SEEDS) -> Result:
    """``run_everywhere``, with several orders of lanes, warps and blocks only: fast enough for large inputs."""
    return run_everywhere(function, [f"seed {seed}" for seed in seeds])


def check_launch(kernel: Kernel, config: LaunchConfig, arguments: Sequence[Argument], device: DeviceProperties) -> None:
    """What does not depend on the text: the number of arguments, dynamic shared memory."""
    if len(arguments) != len(kernel.parameters):
        raise EmulationError(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(arguments)}")
    if config.dynamic_shared > device.shared_bytes_per_block:
        raise EmulationError(
            f"{kernel.name}: {config.dynamic_shared} bytes of dynamic shared memory, the device has "
            f"{device.shared_bytes_per_block}"
        )
    for number, (kind, argument) in enumerate(zip(kernel.parameters, arguments, strict=True)):
        if kind is not F32 and kind(int(argument)).value != (int(argument) or (None if kind is Pointer else 0)):
            raise EmulationError(f"{kernel.name}, argument {number}: {argument} does not fit {kind.__name__}")


def check_parameters(code: ctypes.CDLL, kernel: Kernel) -> None:
    """The declared parameters are as large as those of the text."""
    sizes = (ctypes.c_size_t * 64)()
    count = code.shim_parameters(kernel.name.encode(), sizes)
    declared = [ctypes.sizeof(kind) for kind in kernel.parameters]
    found = list(sizes[: max(count, 0)])
    if count < 0:
        raise EmulationError(f"{kernel.source} has no entry point {kernel.name}")
    if found != declared:
        raise EmulationError(f"{kernel.name}: the text has parameters of {found} bytes, not {declared}")


_NO_BUFFER = 2**64 - 1


def _bits(kind: type[Any], value: Argument) -> int:
    raw = bytes(kind(value))
    return int.from_bytes(raw.ljust(8, b"\0"), "little")


def _around(memory: Sequence[Memory], address: int) -> Memory | None:
    inside = [(begin, array) for begin, array in memory if begin <= address < begin + array.nbytes]
    ends = [(begin, array) for begin, array in memory if address in (begin, begin + array.nbytes)]
    return next(iter(inside + ends), None)


def _index(used: list[Memory], memory: Memory) -> int:
    """Place of a buffer among those used, which it joins."""
    index = next((i for i, other in enumerate(used) if other[1] is memory[1]), len(used))
    used += [memory] if index == len(used) else []
    return index


def _run_case(
    kernel: Kernel,
    config: LaunchConfig,
    buffers: Sequence[Memory],
    places: Sequence[tuple[int, int]],
    links: Sequence[tuple[int, int, int, int]],
    seed: int,
) -> None:
    check_parameters(library(kernel.source, kernel.defines), kernel)

    def u64(*numbers: int) -> bytes:
        return np.array(numbers, np.uint64).tobytes()

    name = kernel.name.encode()
    case = [u64(len(name)), name, u64(*config.grid, *config.block, config.dynamic_shared, seed, len(buffers))]
    for address, array in buffers:
        case += [u64(array.nbytes, address % 256), array.tobytes()]
    case += [u64(len(places)), *(u64(buffer, offset) for buffer, offset in places)]
    case += [u64(len(links)), *(u64(*link) for link in links)]
    # Leaks are none of a kernel's business; wide zones around buffers catch accesses far outside of them.
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0:redzone=2048:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }
    program = binary(kernel.source, kernel.defines, "memory")
    ran = subprocess.run([program], input=b"".join(case), capture_output=True, env=environment, check=False)
    if ran.returncode != 0:
        raise EmulationError(f"{kernel.name}: {ran.stderr.decode(errors='replace')[:4000]}")
    at = 8 + int.from_bytes(ran.stdout[:8], "little")
    if at > 8:
        raise EmulationError(f"{kernel.name}: {ran.stdout[8:at].decode()}")
    for _, array in buffers:
        array[:] = np.frombuffer(ran.stdout, np.uint8, array.nbytes, at)
        at += array.nbytes


def _plain(value: object) -> object:
    """A value as something that ``==`` compares bit for bit."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
