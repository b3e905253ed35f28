"""A stand-in for the driver, which this machine may lack: records calls, reads parameters as the driver would."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bitforbit.cuda.kernel import Kernel
from bitforbit.errors import KernelLaunchError

HOPPER = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "MULTIPROCESSOR_COUNT": 132,
    "L2_CACHE_SIZE": 50 << 20,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 << 10,
}


@dataclass
class Launch:
    """One launch, parameters read through the array of addresses."""

    function: tuple[bytes, str]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared: int
    stream: int
    context: int
    values: list[Any]


@dataclass
class StandIn:
    """The methods of ``bitforbit.cuda.driver.Driver``."""

    kernels: tuple[Kernel, ...] = ()
    attributes: dict[str, int] = field(default_factory=lambda: dict(HOPPER))
    devices: int = 2
    cuda: tuple[int, int] = (13, 0)
    stack: list[int] = field(default_factory=list)
    loads: list[tuple[int, bytes]] = field(default_factory=list)
    limits: list[tuple[str, int]] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    refuse: str = ""
    static: int = 0

    def version(self) -> tuple[int, int]:
        return self.cuda

    def device_count(self) -> int:
        return self.devices

    def name(self, ordinal: int) -> str:
        return f"stand-in {ordinal}"

    def memory(self, ordinal: int) -> int:
        return (80 + ordinal) << 30

    def attribute(self, ordinal: int, name: str) -> int:
        return self.attributes[name]

    def primary_context(self, ordinal: int) -> int:
        return 1000 + ordinal

    def current_context(self) -> int:
        return self.stack[-1] if self.stack else 0

    def push(self, context: int) -> None:
        self.stack.append(context)

    def pop(self) -> None:
        self.stack.pop()

    @contextlib.contextmanager
    def loading(self, context: int) -> Iterator[None]:
        self.push(context)
        try:
            yield
        finally:
            self.pop()

    def load(self, cubin: bytes) -> bytes:
        self.loads.append((self.current_context(), cubin))
        return cubin

    def function(self, module: bytes, name: str) -> tuple[bytes, str]:
        return module, name

    def static_shared(self, function: tuple[bytes, str]) -> int:
        return self.static

    def allow_dynamic_shared(self, function: tuple[bytes, str], nbytes: int) -> None:
        self.limits.append((function[1], nbytes))

    def launch(
        self,
        function: tuple[bytes, str],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_shared: int,
        stream: int,
        parameters: int,
    ) -> None:
        if self.refuse:
            raise KernelLaunchError(self.refuse)
        kinds = next(kernel.parameters for kernel in self.kernels if kernel.name == function[1])
        addresses = (ctypes.c_void_p * len(kinds)).from_address(parameters)
        values = [kind.from_address(address).value for kind, address in zip(kinds, addresses, strict=True)]
        self.launches.append(Launch(function, grid, block, dynamic_shared, stream, self.current_context(), values))
