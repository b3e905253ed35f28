"""Builds kernel texts with the host's C++ compiler against ``shim.hpp``, once per text and flavour."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitforbit.cuda import sources

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "cuda_shim"

Defines = tuple[tuple[str, str], ...]

COMMON = ("-std=c++20", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-pthread", "-w")
"""Hidden: else the libraries that one process loads would share their lists of kernels."""


@dataclass(frozen=True)
class Flavour:
    """How the emulation is built."""

    engine: tuple[str, ...]
    """Files beside ``shim.hpp`` that are linked."""
    engine_flags: tuple[str, ...]
    kernel_flags: tuple[str, ...]
    link_flags: tuple[str, ...]


_ENGINE = ("fibres.cpp", "copies.cpp", "wgmma.cpp", "launch.cpp")
_SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

FLAVOURS = {
    # A library. Misaligned accesses end the launch with a message, by a function of launch.cpp.
    "plain": Flavour((*_ENGINE,), ("-O2", "-DSHIM_CHECK_ALIGNMENT"), ("-O2", "-fsanitize=alignment"), ("-shared",)),
    # A library. races.cpp takes the calls that the sanitizer's flag puts before the kernel's loads and stores.
    "races": Flavour((*_ENGINE, "races.cpp"), ("-O2",), ("-O1", "-fsanitize=thread"), ("-shared",)),
    # A program.
    "memory": Flavour((*_ENGINE, "runner.cpp"), _SANITIZERS, _SANITIZERS, _SANITIZERS),
}


class EmulationError(AssertionError):
    """A kernel did what no kernel may: deadlock, a wrong mask, a misaligned access, a race, ..."""


@functools.cache
def library(source: str, defines: Defines = (), flavour: str = "plain") -> ctypes.CDLL:
    """A kernel text as a shared library; flavour ``plain`` or ``races``."""
    return ctypes.CDLL(str(binary(source, defines, flavour)))


@functools.cache
def binary(source: str, defines: Defines, flavour: str) -> Path:
    """A kernel text, built: a shared library, or for the flavour ``memory`` a program."""
    text = "".join(f"#define {name} {value}\n" for name, value in defines) + sources.text(source)
    entries = "".join(f"SHIM_KERNEL({name}, ({bound}))\n" for name, bound in sources.launch_bounds(source).items())
    body = f'#include "shim.hpp"\n{text}\n{entries}'
    how = FLAVOURS[flavour]

    def build(folder: Path, target: Path) -> None:
        (folder / "kernel.cpp").write_text(body)
        kernel = folder / "kernel.o"
        _run(source, *COMMON, *how.kernel_flags, "-I", HERE, "-c", "-o", kernel, folder / "kernel.cpp")
        objects = [_engine(name, how.engine_flags) for name in how.engine]
        _run(source, "-pthread", *how.link_flags, "-o", target, kernel, *objects)

    return _built(f"{Path(source).stem}-{flavour}", (body, *how.kernel_flags), build)


@functools.cache
def _engine(name: str, flags: Sequence[str]) -> Path:
    def build(folder: Path, target: Path) -> None:
        _run(name, *COMMON, *flags, "-c", "-o", target, HERE / name)

    return _built(Path(name).stem, flags, build)


def _built(name: str, inputs: Sequence[str], build: Callable[[Path, Path], None]) -> Path:
    """What ``build(folder for scratch, target)`` makes, kept under a name that tells its inputs."""
    key = repr((*inputs, COMMON, _compiler())).encode() + _headers()
    path = BUILD / f"{name}-{hashlib.sha256(key).hexdigest()[:20]}"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            build(Path(scratch), Path(scratch) / "target")
            (Path(scratch) / "target").rename(path)
    return path


@functools.cache
def _headers() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(HERE.glob("*.[hc]pp")))


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _run(source: str, *arguments: str | Path) -> None:
    built = subprocess.run([_compiler(), *arguments], capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise EmulationError(f"{source} does not compile:\n{built.stderr[:4000]}")
