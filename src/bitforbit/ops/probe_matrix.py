"""A matrix of many rows from few: a chunk of rows mapped again and again into one range of addresses."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MAP_FIXED, _MAP_ANONYMOUS = 0x10, 0x20
_MOST_MAPPINGS = 8192  # of the 65530 that Linux allows a process


def chunk_rows(rows: int, cols: int, wanted: int) -> int:
    """Rows of a chunk that fill whole pages (of BF16), about ``wanted``; ``rows`` if there is no such number."""
    step = int(np.lcm(2 * cols, mmap.PAGESIZE)) // (2 * cols)
    return min(rows, max(1, wanted // step) * step)


@contextmanager
def repeated(chunk: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    """``[rows, cols]`` whose row i is row ``i % len(chunk)`` of a BF16 chunk. Do not use it after the context.

    It takes the memory of one chunk where Linux lets us map it and chunks are whole pages, else that of a copy.
    """
    mapped = None
    if sys.platform == "linux" and rows > len(chunk) and rows <= _MOST_MAPPINGS * len(chunk):
        mapped = _map(chunk, rows)
    if mapped is None:
        yield chunk.repeat(-(-rows // len(chunk)), 1)[:rows] if rows > len(chunk) else chunk[:rows].contiguous()
        return
    address, size, memory = mapped
    try:
        yield torch.from_numpy(memory).view(torch.bfloat16).view(rows, chunk.shape[1])
    finally:
        _libc().munmap(address, size)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _map(chunk: torch.Tensor, rows: int) -> tuple[int, int, np.ndarray[tuple[int], np.dtype[np.uint8]]] | None:
    """Address, size, bytes of the matrix; None if the system refuses a step."""
    chunk_bytes, total = chunk.numel() * 2, rows * chunk.shape[1] * 2
    size = -(-total // mmap.PAGESIZE) * mmap.PAGESIZE
    if chunk_bytes % mmap.PAGESIZE:
        return None
    libc, failed = _libc(), ctypes.c_void_p(-1).value
    try:
        descriptor = os.memfd_create("bitforbit-probe")
    except OSError:
        return None
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(chunk.contiguous().view(torch.uint8).numpy().tobytes())
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
        if address == failed:
            return None
        for at in range(0, size, chunk_bytes):
            length = min(chunk_bytes, size - at)
            flags = mmap.MAP_SHARED | _MAP_FIXED
            if libc.mmap(address + at, length, mmap.PROT_READ, flags, descriptor, 0) == failed:
                libc.munmap(address, size)
                return None
    except OSError:
        return None
    finally:
        os.close(descriptor)
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * total).from_address(address))
    return address, size, memory
