"""Threads of the kernels: their own, or those of an OpenMP runtime that is loaded."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import bitforbit
from bitforbit.cpu import threads
from helpers.bits import assert_bitwise_equal


def test_own_threads_where_no_openmp_is_loaded() -> None:
    script = "from bitforbit.cpu import threads; print(repr(threads.share_openmp_threads()))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "''"


def test_threads_of_openmp_give_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    torch.ones(1 << 20).sum()
    weights = np.random.default_rng(0).integers(0, 1 << 16, (1000, 700), dtype=np.uint16)
    weights[:, :600] = 0x3C00 | weights[:, :600] & 0x81FF
    expected = weights.copy()
    path = threads.share_openmp_threads()
    try:
        assert "omp" in path
        for count in (1, 2, 3, 8):
            encoded = bitforbit.encode(weights.view(ml_dtypes.bfloat16), threads=count)
            assert_bitwise_equal(encoded.decode(threads=count).view(np.uint16), expected)
    finally:
        threads.own_threads()


def test_errors_cross_the_threads_of_openmp() -> None:
    pytest.importorskip("torch")
    script = """
import torch, numpy as np, bitforbit
from bitforbit.cpu import threads, planes
from bitforbit.codecs.planes.codec import PlanesCodec
from bitforbit.errors import CorruptTensorError
torch.ones(1 << 20).sum()
assert threads.share_openmp_threads()
data = np.random.default_rng(0).integers(0, 255, 2 * 4096 * 128, dtype=np.uint8)
codec = PlanesCodec()
encoded = codec.encode_always(data, "BF16", (4096, 128), "BF16", 2)
encoded.parts["digits"][:] ^= 3
try:
    codec.decode(encoded, np.empty_like(data), None, 4)
except CorruptTensorError:
    print("refused")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "refused"


def test_a_forked_child_uses_threads_of_its_own() -> None:
    pytest.importorskip("torch")
    script = """
import os, torch, numpy as np, bitforbit
from bitforbit.cpu import threads
torch.ones(1 << 20).sum()
assert threads.share_openmp_threads()
weights = (np.random.default_rng(0).standard_normal((1000, 700)) * 0.02).astype(np.float32)
encoded = bitforbit.encode(weights, threads=2)
child = os.fork()
if child == 0:
    same = np.array_equal(encoded.decode(threads=2), weights)
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)
