"""Binaries of kernels on disk, in ``kernels/`` of ``bitforbit.cachedir``: what is compiled once is there for all.

One file per key: text, options, macros, architecture, NVRTC's version. A file is written under another name and then
renamed, so any number of processes may meet here; one that is damaged, cut short or of another key is built anew. Where
nothing can be written, binaries live in memory and one warning says so.

    [0:8)    magic and version of this layout
    [8:40)   SHA-256 of the key's digest and the cubin
    [40:48)  u64 length of the cubin, little-endian
    [48:)    cubin
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from bitforbit import cachedir
from bitforbit.cuda import compiler

MAGIC = b"bfbcubn\x01"
_LENGTH = slice(40, 48)
_BODY = 48

_memory: dict[str, bytes] = {}
_lock = threading.Lock()


def cubin(text: str, arch: str, defines: Sequence[tuple[str, str]] = (), name: str = "kernel.cu") -> bytes:
    """The binary of a text, from memory, disk or the compiler. Raises KernelBuildError, GpuPackageError."""
    key = digest(text, arch, defines)
    with _lock:  # threads that want the same binary wait for one compilation
        if key not in _memory:
            file = path(key, name, arch)
            found = None if file is None else read(file, key)
            if found is None:
                found = compiler.compile(text, arch, defines, name=name)
                if file is None or not write(file, key, found):
                    _warn(None if file is None else file.parent)
            _memory[key] = found
        return _memory[key]


def digest(text: str, arch: str, defines: Sequence[tuple[str, str]]) -> str:
    """The key: SHA-256, in hex, of all that a binary depends on."""
    facts = [MAGIC.hex(), compiler.version(), compiler.command(arch, defines), text]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def path(key: str, name: str, arch: str) -> Path | None:
    """The file of a key; None where there is no place for a cache."""
    try:
        return cachedir.directory() / "kernels" / f"{Path(name).stem}-{arch}-{key[:24]}.cubin"
    except RuntimeError:  # no home directory
        return None


def read(file: Path, key: str) -> bytes | None:
    """The binary in a file; None if it is missing, damaged, or another key's."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    body = content[_BODY:]
    if content[:8] != MAGIC or content[_LENGTH] != len(body).to_bytes(8, "little"):
        return None
    return body if content[8:40] == _checksum(key, body) else None


def write(file: Path, key: str, body: bytes) -> bool:
    """Put a binary where ``read`` finds it; False if that is not possible."""
    content = MAGIC + _checksum(key, body) + len(body).to_bytes(8, "little") + body
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.stem, suffix=".tmp", delete=False) as new:
            try:
                new.write(content)
                new.flush()
                os.fsync(new.fileno())
                new.close()
                Path(new.name).replace(file)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(new.name).unlink()
                raise
    except OSError:
        return False
    return True


def forget() -> None:
    """Empty the memory: the next ``cubin`` looks on disk again."""
    with _lock:
        _memory.clear()
        _warn.cache_clear()


def _checksum(key: str, body: bytes) -> bytes:
    return hashlib.sha256(bytes.fromhex(key) + body).digest()


@functools.cache
def _warn(folder: Path | None) -> None:
    where = "there is no home directory" if folder is None else f"{folder} cannot be written"
    warnings.warn(
        f"compiled GPU kernels are not kept: {where}. Every process compiles them again; set BITFORBIT_CACHE to a "
        "directory that can be written.",
        RuntimeWarning,
        stacklevel=3,
    )
