"""Runs kernels on a GPU: compiled (or found in the cache) and loaded at first use, then enqueued with little overhead.

Launches go straight to the driver's cuLaunchKernel: parameters are packed by one ``struct`` call into memory that stays
where it is, so that nothing is made per argument. They work in the device's primary context, which torch uses too.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from bitforbit.cuda import cache, compiler, device, driver, sources
from bitforbit.cuda.driver import Driver
from bitforbit.cuda.kernel import F32, I32, U32, U64, Argument, DeviceProperties, Kernel, LaunchConfig, Pointer
from bitforbit.errors import KernelLaunchError

FREE_SHARED_BYTES = 48 << 10
"""Shared memory, static and dynamic, that a block may have without asking for it."""

_SLOTS = {Pointer: "Q", U64: "Q", U32: "I4x", I32: "i4x", F32: "f4x"}
"""How a parameter lies in its slot of 8 bytes."""


class CudaLauncher:
    """Launches on one GPU, from any thread."""

    def __init__(self, ordinal: int, driver: Driver, properties: DeviceProperties) -> None:
        self.ordinal = ordinal
        self._driver = driver
        self._properties = properties
        self._target = compiler.target(properties.compute_capability)
        self._context = driver.primary_context(ordinal)
        self._modules: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._loaded: dict[Kernel, _Loaded] = {}
        self._lock = threading.RLock()

    @property
    def properties(self) -> DeviceProperties:
        """Of the GPU."""
        return self._properties

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Compile and load kernels now rather than at their first launch. Raises KernelBuildError."""
        for kernel in kernels:
            self._load(kernel)

    def launch(self, kernel: Kernel, config: LaunchConfig, arguments: Sequence[Argument], stream: int) -> None:
        """Enqueue a kernel on a stream; an empty grid enqueues nothing.

        Allocates and waits for nothing once the kernel is loaded, and may be captured into a graph. Raises
        KernelLaunchError, at the first launch KernelBuildError too.
        """
        loaded = self._loaded.get(kernel) or self._load(kernel)
        if 0 in config.grid:
            return
        if self._driver.current_context() == self._context:
            loaded.launch(self._driver, config, arguments, stream)
            return
        self._driver.push(self._context)
        try:
            loaded.launch(self._driver, config, arguments, stream)
        finally:
            self._driver.pop()

    def _load(self, kernel: Kernel) -> _Loaded:
        with self._lock:
            if (found := self._loaded.get(kernel)) is not None:
                return found
            key = (kernel.source, kernel.defines)
            with self._driver.loading(self._context):
                if key not in self._modules:
                    binary = cache.cubin(sources.text(kernel.source), self._target, kernel.defines, kernel.source)
                    self._modules[key] = self._driver.load(binary)
                function = self._driver.function(self._modules[key], kernel.name)
                loaded = _Loaded(kernel, function, FREE_SHARED_BYTES - self._driver.static_shared(function))
            self._loaded[kernel] = loaded
            return loaded


class _Loaded:
    """A kernel in a context, and memory for its parameters."""

    def __init__(self, kernel: Kernel, function: Any, dynamic_shared: int) -> None:
        self.kernel = kernel
        self._function = function
        self._format = struct.Struct("<" + "".join(_SLOTS[kind] for kind in kernel.parameters))
        self._values = (ctypes.c_uint64 * max(1, len(kernel.parameters)))()
        first = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * len(self._values))(*range(first, first + ctypes.sizeof(self._values), 8))
        self._parameters = ctypes.addressof(self._pointers)
        self._dynamic_shared = dynamic_shared  # what launches may have, so far
        # The driver copies the parameters before it returns, so one set of them is enough.
        self._lock = threading.Lock()

    def launch(self, driver: Driver, config: LaunchConfig, arguments: Sequence[Argument], stream: int) -> None:
        """Enqueue in the current context."""
        with self._lock:
            try:
                self._format.pack_into(self._values, 0, *arguments)
            except struct.error as error:
                kinds = ", ".join(kind.__name__ for kind in self.kernel.parameters)
                raise KernelLaunchError(
                    f"{self.kernel.name}: expected arguments ({kinds}), got {tuple(arguments)}: {error}"
                ) from error
            try:
                if config.dynamic_shared > self._dynamic_shared:
                    driver.allow_dynamic_shared(self._function, config.dynamic_shared)
                    self._dynamic_shared = config.dynamic_shared
                driver.launch(
                    self._function, config.grid, config.block, config.dynamic_shared, stream, self._parameters
                )
            except KernelLaunchError as error:
                raise KernelLaunchError(f"{self.kernel.name} with {config}: {error}") from error


@functools.cache
def for_device(ordinal: int) -> CudaLauncher:
    """The launcher of a GPU; one per process. Raises GpuUnavailableError."""
    return CudaLauncher(ordinal, driver.get(), device.require(ordinal))
