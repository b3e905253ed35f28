"""The boundary to NVIDIA's driver: the few calls that bitforbit makes, through cuda.bindings, and nothing else.

cuda.bindings mirrors the driver's C interface one to one, under the same names in every version, and comes with torch's
CUDA builds; it finds ``libcuda`` by itself. Tests put a stand-in with these methods in place of ``Driver``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from bitforbit.errors import GpuDriverError, GpuNotFoundError, GpuPackageError, KernelBuildError, KernelLaunchError

INSTALL = "install them with: pip install 'bitforbit[cuda]'"
ON_CPU = "everything keeps working on the CPU"

_NAME_BYTES = 256
_BAD_IMAGES = ("CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
_lock = threading.Lock()


class Driver:
    """An initialized driver. Handles are cuda.bindings' own objects; contexts compare as ints."""

    def __init__(self) -> None:
        """Raises GpuPackageError, GpuDriverError, GpuNotFoundError."""
        self._cuda: Any = bindings()
        self._success: Any = self._cuda.CUresult.CUDA_SUCCESS
        try:
            (code,) = self._cuda.cuInit(0)
        except RuntimeError as error:  # cuda.bindings found no libcuda
            raise GpuDriverError(
                f"expected NVIDIA's driver (libcuda.so.1), got: {error}; install the driver; {ON_CPU}"
            ) from error
        if code == self._cuda.CUresult.CUDA_ERROR_NO_DEVICE:
            raise GpuNotFoundError(
                "expected an NVIDIA GPU, the driver knows none (CUDA_VISIBLE_DEVICES may hide them); " + ON_CPU
            )
        if code != self._success:
            raise GpuDriverError(
                f"expected NVIDIA's driver to start, got {code.name}; see whether nvidia-smi works; {ON_CPU}"
            )

    def version(self) -> tuple[int, int]:
        """Newest CUDA version that the driver knows: ``(13, 0)``."""
        number = self._call("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def device_count(self) -> int:
        """Devices that this process sees."""
        return int(self._call("cuDeviceGetCount"))

    def name(self, ordinal: int) -> str:
        """Name of a device."""
        name: bytes = self._call("cuDeviceGetName", _NAME_BYTES, self._call("cuDeviceGet", ordinal))
        return name.split(b"\0")[0].decode(errors="replace").strip()

    def memory(self, ordinal: int) -> int:
        """Bytes of a device's memory."""
        return int(self._call("cuDeviceTotalMem", self._call("cuDeviceGet", ordinal)))

    def attribute(self, ordinal: int, name: str) -> int:
        """An attribute of a device: ``name`` as in ``CU_DEVICE_ATTRIBUTE_<name>``."""
        attribute = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", attribute, self._call("cuDeviceGet", ordinal)))

    def primary_context(self, ordinal: int) -> int:
        """The device's primary context, the one that torch uses; kept for the life of the process."""
        return int(self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", ordinal)))

    def current_context(self) -> int:
        """This thread's context; 0 if it has none."""
        code, context = self._cuda.cuCtxGetCurrent()  # not by _call: this is part of every launch
        if code != self._success:
            self._check("cuCtxGetCurrent", code)
        return int(context)

    def push(self, context: int) -> None:
        """Make a context this thread's."""
        self._call("cuCtxPushCurrent", context)

    def pop(self) -> None:
        """Undo ``push``."""
        self._call("cuCtxPopCurrent")

    @contextlib.contextmanager
    def loading(self, context: int) -> Iterator[None]:
        """Within this, a context is this thread's, and ``load`` and ``function`` are legal also while some stream of
        the process is being captured into a graph."""
        modes = self._cuda.CUstreamCaptureMode
        self.push(context)
        try:
            before = self._call("cuThreadExchangeStreamCaptureMode", modes.CU_STREAM_CAPTURE_MODE_RELAXED)
            try:
                yield
            finally:
                self._call("cuThreadExchangeStreamCaptureMode", before)
        finally:
            self.pop()

    def load(self, cubin: bytes) -> Any:
        """Load a binary into this thread's context. Raises KernelBuildError if it is none for this device."""
        code, module = self._cuda.cuModuleLoadData(cubin)
        if code.name in _BAD_IMAGES:
            raise KernelBuildError(
                f"expected a binary that the driver loads, got {code.name}; a driver at least as new as NVRTC is needed"
            )
        self._check("cuModuleLoadData", code)
        return module

    def function(self, module: Any, name: str) -> Any:
        """An entry point of a loaded binary."""
        code, function = self._cuda.cuModuleGetFunction(module, name.encode())
        if code != self._success:
            raise KernelBuildError(f'expected an extern "C" entry point {name} in the kernel text, got {code.name}')
        return function

    def static_shared(self, function: Any) -> int:
        """Bytes of shared memory that a function has by itself."""
        attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        return int(self._call("cuFuncGetAttribute", attribute, function))

    def allow_dynamic_shared(self, function: Any, nbytes: int) -> None:
        """Let launches of a function have this much dynamic shared memory."""
        attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, attribute, nbytes)

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_shared: int,
        stream: int,
        parameters: int,
    ) -> None:
        """Enqueue a function; ``parameters`` is the address of an array of addresses of its parameters."""
        (code,) = self._cuda.cuLaunchKernel(function, *grid, *block, dynamic_shared, stream, parameters, 0)
        if code != self._success:
            self._check("cuLaunchKernel", code)

    def capture_id(self, stream: int) -> int:
        """The number, unique in this process, of the graph capture that a stream is in; 0 if it is in none."""
        code, status, number, *_ = self._cuda.cuStreamGetCaptureInfo(stream)
        self._check("cuStreamGetCaptureInfo", code)
        return int(number) if status == self._cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE else 0

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._cuda, name)(*arguments)
        self._check(name, code)
        return results[0] if results else None

    def _check(self, name: str, code: Any) -> None:
        if code != self._success:
            raise KernelLaunchError(
                f"expected {name} to succeed, got {code.name} ({code.value}); it may come from work enqueued before: "
                "run with CUDA_LAUNCH_BLOCKING=1 or under compute-sanitizer"
            )


def bindings() -> Any:
    """The module ``cuda.bindings.driver``. Raises GpuPackageError if it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GpuPackageError(
            f"expected the package cuda-bindings, got: {error}; {INSTALL} (without it, {ON_CPU})"
        ) from error
    return driver


def get() -> Driver:
    """The driver, started at the first call. A failure is not remembered. Raises as ``Driver``."""
    with _lock:
        return _started()


@functools.cache
def _started() -> Driver:
    return Driver()
