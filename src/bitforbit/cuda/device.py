"""The GPUs of this machine: how many, what they are, and why one cannot be used."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bitforbit.cuda import compiler, driver
from bitforbit.cuda.driver import ON_CPU, Driver
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.errors import GpuDriverError, GpuNotFoundError, GpuUnavailableError


@dataclass(frozen=True)
class Status:
    """What ``bitforbit info`` tells."""

    gpus: tuple[str, ...]
    """Name and compute capability of each."""
    driver: str | None
    """Newest CUDA version that the driver knows."""
    nvrtc: str | None
    """Version of the kernels' compiler."""
    problem: str | None
    """Why no GPU can be used."""


def count() -> int:
    """Number of GPUs that this process sees; 0 without driver, packages or GPU."""
    try:
        return driver.get().device_count()
    except GpuUnavailableError:
        return 0


def available(ordinal: int = 0) -> bool:
    """Whether kernels can be compiled for and run on a GPU."""
    try:
        require(ordinal)
    except GpuUnavailableError:
        return False
    return True


@functools.cache
def require(ordinal: int = 0) -> DeviceProperties:
    """The properties of a GPU that kernels can be compiled for and run on. A failure is not remembered.

    Raises GpuUnavailableError: GpuPackageError, GpuDriverError, GpuNotFoundError or GpuArchitectureError.
    """
    return examine(driver.get(), ordinal)


def examine(driver: Driver, ordinal: int) -> DeviceProperties:
    """As ``require``, with a given driver."""
    nvrtc = compiler.version()
    if driver.version()[0] < nvrtc[0]:
        raise GpuDriverError(
            f"expected a driver for CUDA {nvrtc[0]} (NVRTC is {nvrtc[0]}.{nvrtc[1]}), got one for CUDA "
            f"{'.'.join(map(str, driver.version()))}; install a newer driver; {ON_CPU}"
        )
    devices = driver.device_count()
    if not 0 <= ordinal < devices:
        raise GpuNotFoundError(f"expected a GPU below {devices}, got cuda:{ordinal}; {ON_CPU}")
    found = properties(driver, ordinal)
    compiler.target(found.compute_capability)
    return found


def properties(driver: Driver, ordinal: int) -> DeviceProperties:
    """What the driver tells of a GPU."""
    return DeviceProperties(
        driver.name(ordinal),
        _capability(driver, ordinal),
        driver.attribute(ordinal, "MULTIPROCESSOR_COUNT"),
        driver.attribute(ordinal, "L2_CACHE_SIZE"),
        driver.attribute(ordinal, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
    )


def status() -> Status:
    """All that can be told without raising."""
    gpus: tuple[str, ...] = ()
    cuda = nvrtc = problem = None
    try:
        nvrtc = ".".join(map(str, compiler.version()))
    except GpuUnavailableError as error:
        problem = str(error)
    try:
        started = driver.get()
        cuda = ".".join(map(str, started.version()))
        gpus = tuple(
            "{} (compute capability {}.{})".format(started.name(i), *_capability(started, i))
            for i in range(started.device_count())
        )
        if problem is None:
            require(0)
    except GpuUnavailableError as error:
        problem = problem or str(error)
    return Status(gpus, cuda, nvrtc, problem)


def _capability(driver: Driver, ordinal: int) -> tuple[int, int]:
    return (
        driver.attribute(ordinal, "COMPUTE_CAPABILITY_MAJOR"),
        driver.attribute(ordinal, "COMPUTE_CAPABILITY_MINOR"),
    )
