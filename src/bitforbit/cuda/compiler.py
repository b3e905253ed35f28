"""Kernel texts to binaries: NVRTC, through cuda.bindings. Needs no GPU, no header and no CUDA toolkit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from bitforbit.cuda.driver import INSTALL, ON_CPU
from bitforbit.errors import GpuArchitectureError, GpuPackageError, KernelBuildError

OLDEST = (8, 0)
"""Compute capability that the kernels need: BF16 arithmetic and asynchronous copies begin there."""
OPTIONS = ("--std=c++17",)
"""What every text is compiled with; part of a binary's key in the cache."""

_LOG_LIMIT = 8000


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version: ``(13, 0)``. Raises GpuPackageError if it is missing."""
    major, minor = _call(_nvrtc(), "nvrtcVersion")
    return int(major), int(minor)


@functools.cache
def supported() -> tuple[int, ...]:
    """Architectures that NVRTC knows, ascending: 90 for sm_90. Raises GpuPackageError if it is missing."""
    (archs,) = _call(_nvrtc(), "nvrtcGetSupportedArchs")
    return tuple(sorted(archs))


def target(capability: tuple[int, int], known: Sequence[int] | None = None) -> str:
    """The architecture to compile for: ``sm_90a`` for compute capability 9.0.

    From 9.0 on a known one has the suffix "a", for instructions of its own; such binaries run on exactly that
    architecture. A minor version that NVRTC does not know gets the plain binary of the newest one before it, which
    runs on it by NVIDIA's rules. Raises GpuArchitectureError where there is none.
    """
    known = supported() if known is None else known
    major, minor = capability
    if capability < OLDEST:
        raise GpuArchitectureError(
            f"expected a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer, got {major}.{minor}; {ON_CPU}"
        )
    if 10 * major + minor in known:
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    older = [arch for arch in known if arch // 10 == major and arch % 10 < minor]
    if older:
        return f"sm_{max(older)}"
    raise GpuArchitectureError(
        f"expected a GPU that NVRTC knows (compute capabilities {', '.join(f'{a // 10}.{a % 10}' for a in known)}), "
        f"got {major}.{minor}; install a newer nvidia-cuda-nvrtc; {ON_CPU}"
    )


def compile(
    text: str, arch: str, defines: Sequence[tuple[str, str]] = (), options: Sequence[str] = (), name: str = "kernel.cu"
) -> bytes:
    """A cubin of a self-contained text for an architecture (``sm_90a``). Raises KernelBuildError, GpuPackageError."""
    return compile_with_log(text, arch, defines, options, name)[0]


def compile_with_log(
    text: str, arch: str, defines: Sequence[tuple[str, str]] = (), options: Sequence[str] = (), name: str = "kernel.cu"
) -> tuple[bytes, str]:
    """As ``compile``, with what NVRTC said: with the option ``--ptxas-options=-v`` registers, spills, shared memory."""
    nvrtc = _nvrtc()
    arguments = [option.encode() for option in (*command(arch, defines), *options)]
    (program,) = _call(nvrtc, "nvrtcCreateProgram", text.encode(), name.encode(), 0, [], [])
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        log = (
            _text(nvrtc, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
        )
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelBuildError(
                f"expected {name} to compile for {arch}, got {code.name} from NVRTC {version()[0]}.{version()[1]}:\n"
                + log[:_LOG_LIMIT]
            )
        return _text(nvrtc, program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def command(arch: str, defines: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The options of one compilation."""
    return (f"--gpu-architecture={arch}", *OPTIONS, *(f"--define-macro={name}={value}" for name, value in defines))


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise GpuPackageError(f"expected the package cuda-bindings, got: {error}; {INSTALL}; {ON_CPU}") from error
    return nvrtc


def _call(nvrtc: Any, name: str, *arguments: Any) -> list[Any]:
    try:
        code, *results = getattr(nvrtc, name)(*arguments)
    except RuntimeError as error:  # cuda.bindings found no libnvrtc
        raise GpuPackageError(f"expected NVRTC (libnvrtc), got: {error}; {INSTALL}; {ON_CPU}") from error
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelBuildError(f"expected {name} to succeed, got {code.name}")
    return list(results)


def _text(nvrtc: Any, program: Any, size: str, get: str) -> bytes:
    (nbytes,) = _call(nvrtc, size, program)
    buffer = bytes(nbytes)  # NVRTC writes into it, as cuda.bindings wants it
    _call(nvrtc, get, program, buffer)
    return buffer
