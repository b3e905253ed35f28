"""Comparisons of bits: no tolerance, and the place of the first difference."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np


def _bytes(value: Any) -> np.ndarray:
    if isinstance(value, bytes | bytearray | memoryview):
        return np.frombuffer(value, dtype=np.uint8)
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def assert_bitwise_equal(got: Any, expected: Any, what: str = "data") -> None:
    """Arrays or bytes hold the same bits; the message names the first byte that differs."""
    if isinstance(got, np.ndarray) and isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
        assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    a, b = _bytes(got), _bytes(expected)
    assert len(a) == len(b), f"{what}: {len(a)} bytes, expected {len(b)}"
    if not np.array_equal(a, b):
        places = np.flatnonzero(a != b)
        i = int(places[0])
        raise AssertionError(
            f"{what}: byte {i} is 0x{a[i]:02x}, expected 0x{b[i]:02x}; {len(places)} of {len(a)} bytes differ"
        )


def digest_tree(root: Path) -> dict[str, str]:
    """SHA-256 of every file by relative path; None-like marker for directories."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(root.rglob("*"))
    }


def assert_same_tree(got: Path, expected: Path) -> None:
    """Two directories hold the same files and directories, byte for byte."""
    a, b = digest_tree(got), digest_tree(expected)
    assert a.keys() == b.keys()
    for path in a:
        if a[path] != b[path]:
            assert_bitwise_equal((got / path).read_bytes(), (expected / path).read_bytes(), path)
            raise AssertionError(f"{path}: one is a directory")
