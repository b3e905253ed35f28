"""Products of warpgroups: descriptor, swizzle and fragments in the emulation, and what ptxas makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fused_cases import on_hopper

import cuda_shim
from bitforbit.cuda import compiler, sources
from bitforbit.cuda.kernel import Kernel, LaunchConfig, Pointer
from cuda_shim.emulation import EmulationError, run_everywhere

TEXT = str(Path(cuda_shim.__file__).parent / "selftest" / "wgmma.cu")
TOKENS = (8, 16, 32, 64)


@pytest.fixture
def queue(queue: Any) -> Any:
    """One that the instructions run on."""
    return on_hopper(queue)


def product(queue: Any, a: np.ndarray, x: np.ndarray, sums: np.ndarray, **macros: int) -> np.ndarray:
    defines = (("TOKENS", str(len(x))), *((key, str(value)) for key, value in macros.items()))
    kernel = Kernel("multiply", TEXT, (Pointer, Pointer, Pointer), defines)
    left, right, out = (queue.upload(array.tobytes()) for array in (a, x, sums))
    config = LaunchConfig.linear(1, 128, 1024 + 128 * len(x))
    queue.launch(kernel, config, left.address, right.address, out.address)
    return np.frombuffer(queue.download(out), np.float32).reshape(64, len(x))


def small(rows: int, cols: int, seed: int, kind: Any = ml_dtypes.bfloat16) -> np.ndarray:
    """Whole numbers, of which all sums are exact in FP32 in any order."""
    return np.random.default_rng(seed).integers(-99, 100, (rows, cols)).astype(kind)


@pytest.mark.parametrize("tokens", TOKENS)
def test_products(queue: Any, tokens: int) -> None:
    a, x, sums = small(64, 64, 1), small(tokens, 64, 2), small(64, tokens, 3, np.float32)
    expected = a.astype(np.float32) @ x.astype(np.float32).T + sums
    np.testing.assert_array_equal(product(queue, a, x, sums), expected)


@pytest.mark.parametrize("tokens", TOKENS)
def test_products_in_every_mode(tokens: int) -> None:
    a, x, sums = small(64, 64, 4), small(tokens, 64, 5), small(64, tokens, 6, np.float32)
    expected = a.astype(np.float32) @ x.astype(np.float32).T + sums
    np.testing.assert_array_equal(run_everywhere(lambda queue: product(queue, a, x, sums)), expected)


@pytest.mark.parametrize(
    ("macro", "value", "message"),
    [
        ("PROXY", 0, "read by a tensor core, without fence_async"),
        ("FENCE", 0, "no wgmma_fence"),
        ("WAIT", 1, "ends while products of its warpgroup are under way"),
        ("TOUCH", 1, "registers of a were changed before the wait"),
        ("ODD", 1, "warps of a warpgroup multiply by different b"),
    ],
)
def test_what_is_missing_shows(macro: str, value: int, message: str) -> None:
    a, x, sums = small(64, 64, 7), small(8, 64, 8), small(64, 8, 9, np.float32)

    with pytest.raises(EmulationError, match=message):
        run_everywhere(lambda queue: product(queue, a, x, sums, **{macro: value}))


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_compiler_keeps_products_asynchronous(tokens: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    options = ["--ptxas-options=-v"]
    _, log = compiler.compile_with_log(sources.text(TEXT), "sm_90a", (("TOKENS", str(tokens)),), options, TEXT)
    assert "Used" in log
    assert "serialized" not in log
    assert "C75" not in log
