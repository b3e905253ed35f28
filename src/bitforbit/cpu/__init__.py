"""Typed wrappers over the native library, and the choice of its instruction set."""

from bitforbit.cpu.isa import active, force, implementations
from bitforbit.cpu.threads import default_threads

__all__ = ["active", "default_threads", "force", "implementations"]
