"""All kernels of the package, for those who compile them ahead, count their instructions or test every one."""

from __future__ import annotations

from dataclasses import dataclass

from bitforbit.cuda.kernel import Kernel


@dataclass(frozen=True)
class Entry:
    """A kernel and what its text alone does not tell."""

    kernel: Kernel
    weights_per_iteration: int = 0
    """Weights that one thread handles in one pass through the main loop, or, where the kernel has no loop, in all; 0
    for kernels that do not go through weights one by one."""
    local_memory: str = ""
    """Why the kernel may have a stack frame; empty: it must have none."""


ENTRIES: tuple[Entry, ...] = ()

KERNELS: tuple[Kernel, ...] = tuple(entry.kernel for entry in ENTRIES)
