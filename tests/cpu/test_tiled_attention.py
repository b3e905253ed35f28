"""Tiled attention on the CPU: right against FP64 on every instruction set, the same bits however the work is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bitforbit import cpu
from bitforbit.cpu import caches, tiled_attention
from bitforbit.cpu.tiled_attention import Floats, attention, tile_rows
from bitforbit.errors import UsageError

ISAS = [name for name, supported in cpu.implementations().items() if supported]
KERNELS = {"scalar": "scalar", "avx2": "avx2"}
every_isa = pytest.mark.parametrize("isa", ISAS)
every_order = pytest.mark.parametrize("order", tiled_attention.ORDERS)


def reference(q: Floats, k: Floats, v: Floats, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[np.float64]:
    """Plain attention in that precision."""
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    s = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2]).astype(dtype)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) @ v


def rms(x: npt.NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def inputs(heads: int, queries: int, keys: int, channels: int, scale: float = 1.0) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(queries * 1000 + keys)
    q = rng.standard_normal((heads, queries, channels), np.float32)
    k, v = rng.standard_normal((2, heads, keys, channels), np.float32)
    return q * np.float32(scale), k, v


@every_isa
@every_order
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 5, 70, 3),
        (1, 64, 64, 64),
        (1, 67, 129, 65),
        (3, 20, 63, 128),
        (1, 130, 200, 80),
        (1, 3, 65, 577),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_close_to_fp64(isa: str, order: str, shape: tuple[int, int, int, int], scale: float) -> None:
    q, k, v = inputs(*shape, scale)
    with cpu.force(isa):
        assert tiled_attention.implementation() == KERNELS.get(isa, "avx512")
        out = attention(q, k, v, order)
    expected = reference(q, k, v)
    plain = reference(q, k, v, np.float32)
    assert rms(out - expected) <= 2 * rms(plain - expected) + 1e-7


@every_isa
@every_order
def test_rows_and_threads_change_nothing(isa: str, order: str) -> None:
    q, k, v = inputs(2, 50, 150, 72)
    with cpu.force(isa):
        expected = attention(q, k, v, order, rows=4)
        for rows in (1, 8, 24, 64, 1000):
            for threads in (1, 3):
                out = attention(q, k, v, order, rows=rows, threads=threads)
                np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))
        alone = attention(np.ascontiguousarray(q[:, 7:8]), k, v, order)
    np.testing.assert_array_equal(alone[:, 0], expected[:, 7])


@every_order
def test_scaling_and_strides(order: str) -> None:
    q, k, v = inputs(2, 9, 40, 16)
    out = attention(q, k, v, order, scaling=0.5)
    np.testing.assert_allclose(out, reference(q * np.float32(2.0), k, v), atol=1e-5)
    strided = [np.asfortranarray(x) for x in (q, k, v)]
    np.testing.assert_array_equal(attention(*strided, order, scaling=0.5), out)  # type: ignore[arg-type]


@every_isa
@every_order
def test_what_is_not_finite_stays_in_its_row(isa: str, order: str) -> None:
    q, k, v = inputs(1, 6, 100, 8)
    q[0, 2, 3], q[0, 4, 0] = np.nan, np.inf
    with cpu.force(isa):
        out = attention(q, k, v, order)
    assert np.isnan(out[0, [2, 4]]).all()
    np.testing.assert_allclose(out[0, [0, 1, 3, 5]], reference(q[:, [0, 1, 3, 5]], k, v)[0], atol=1e-5)


@every_order
def test_huge_scores_do_not_overflow(order: str) -> None:
    q, k, v = inputs(1, 20, 130, 32, scale=1e6)
    np.testing.assert_allclose(attention(q, k, v, order), reference(q, k, v), atol=0.05)


def test_refused() -> None:
    q, k, v = inputs(1, 4, 8, 16)
    with pytest.raises(UsageError, match="an order among flash, square"):
        attention(q, k, v, "spiral")
    with pytest.raises(UsageError, match="q: expected FP32"):
        attention(q.astype(np.float64), k, v, "flash")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="v: expected FP32"):
        attention(q, k, v[0], "flash")
    with pytest.raises(UsageError, match="k: expected FP32"):
        attention(q, k[:, :0], v[:, :0], "flash")
    with pytest.raises(UsageError, match="of one shape"):
        attention(q, k, v[:, :5], "flash")
    with pytest.raises(UsageError, match="of one shape"):
        attention(q[:, :, :8], k, v, "flash")
    with pytest.raises(UsageError, match="rows"):
        attention(q, k, v, "flash", rows=0)
    with pytest.raises(UsageError, match="scaling"):
        attention(q, k, v, "flash", scaling=-1.0)
    with pytest.raises(UsageError, match="threads"):
        attention(q, k, v, "flash", threads=0)


def test_tile_rows() -> None:
    assert [tile_rows("flash", d, 1000, 32 << 10) for d in (64, 128, 256, 512)] == [24, 16, 8, 4]
    assert [tile_rows("square", d, 500, 32 << 10, 1 << 20) for d in (64, 512)] == [64, 64]
    assert [tile_rows("square", 64, keys, 32 << 10, 1 << 20) for keys in (1024, 2048, 65536)] == [32, 16, 16]
    assert tile_rows("flash", 4096, 1000, 1 << 10) == 4


def test_caches(tmp_path: Path) -> None:
    for i, (kind, level, size, shared) in enumerate(
        [("Data", "1", "48K", "0"), ("Instruction", "1", "32K", "0"), ("Unified", "3", "32M", "0-3,8"),
         ("Unified", "2", "1024K", "0,4"), ("Unified", "x", "", "")]
    ):  # fmt: skip
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(text + "\n")
    assert caches.data_caches(tmp_path) == [
        caches.Cache(1, 48 << 10, 1), caches.Cache(2, 1 << 20, 2), caches.Cache(3, 32 << 20, 5),
    ]  # fmt: skip
    assert caches.data_caches(tmp_path / "absent") == []
    assert 8 << 10 <= caches.level_bytes(1) < caches.level_bytes(2)
