"""Quantized caches on the CPU: bytes against the layout's formulas, attention against FP64, on every ISA."""

from __future__ import annotations

import dataclasses
import functools

import ml_dtypes
import numpy as np
import pytest

from bitforbit import cpu
from bitforbit.cpu import kv as native
from bitforbit.errors import KvCacheError
from bitforbit.kv.spec import KiviSpec
from helpers.kv_cases import DTYPES, Array, Cache, attention

ISAS = [name for name, supported in cpu.implementations().items() if supported and name != "avx512_vbmi2"]
START = np.array([0, 37, 300], np.int32)
SPECS = {
    "k4v4": (KiviSpec(4, 4), 128),
    "k2v2": (KiviSpec(2, 2, residual=64, sink=4), 64),
    "k8v8": (KiviSpec(8, 8, group=64, v_group=16, residual=64), 80),
    "k4v2": (KiviSpec(4, 2, v_group=16, residual=32, sink=3), 96),
    "k2v8": (KiviSpec(2, 8, v_group=16, residual=96), 16),
    "k8v4": (KiviSpec(8, 4, group=128, sink=40), 256),
    "k2v4": (KiviSpec(2, 4, group=64, v_group=64, residual=192), 64),
}


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Gaussian, rounded to the dtype; keys and values like these have channels of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1])) + rng.standard_normal(shape[-1])
    return x.astype(DTYPES[dtype]).astype(np.float32)


def make(spec: KiviSpec, dtype: str, head_dim: int, slots: int, start: np.ndarray = START, heads: int = 2) -> Cache:
    shape = (len(start), heads, slots, head_dim)
    return Cache(spec, dtype, numbers(shape, dtype, 1), numbers(shape, dtype, 2), start)


@functools.cache
def grown(name: str, dtype: str) -> tuple[Cache, list[np.ndarray], Array, Array]:
    """A cache after a prefill, single steps and a chunk (scalar), and its reference."""
    spec, head_dim = SPECS[name]
    cache = make(spec, dtype, head_dim, 720)
    with cpu.force("scalar"):
        schedule(cache)
    segments, k, v, bad = cache.reference()
    assert bad == cache.bad == 0
    return cache, segments, k, v


def schedule(cache: Cache) -> None:
    cache.grow(561)
    for _ in range(40):
        cache.grow(1)
    cache.grow(101)


def same_segments(expected: list[np.ndarray], got: list[np.ndarray]) -> None:
    for s, (a, b) in enumerate(zip(expected, got, strict=False)):
        different = np.argwhere(a != b)
        assert not len(different), f"segment {s}: first differing byte (row, head, byte) {different[0]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_bytes(name: str, dtype: str) -> None:
    cache, segments, _, _ = grown(name, dtype)
    same_segments(segments, cache.segments)
    for isa in ISAS[1:]:
        again = make(cache.spec, dtype, cache.head_dim, 720)
        again.threads = 3
        with cpu.force(isa):
            schedule(again)
        same_segments(segments, again.segments)


def hostile(dtype: str, shape: tuple[int, ...]) -> Array:
    """Constant groups, zeros of both signs, subnormals, huge numbers, random bits; all finite."""
    rng = np.random.default_rng(5)
    item = np.dtype(DTYPES[dtype])
    x = rng.integers(0, 1 << (8 * item.itemsize), shape, np.uint64).astype(f"u{item.itemsize}").view(item)
    x = np.where(np.isfinite(x.astype(np.float32)), x, item.type(0))
    largest = ml_dtypes.finfo(item).max
    x[:, :, 32:64] = rng.choice(np.array([0.0, -0.0], item), x[:, :, 32:64].shape)
    x[:, :, 64:96] = item.type(-3.25)
    x[:, :, 96:128] = rng.choice(np.array([largest, -largest, 0.0, 1.0], item), x[:, :, 96:128].shape)
    x[:, :, 128:160] = item.type(largest)
    x[:, :, 160:192] = -item.type(largest)
    x[:, :, 192:224] = rng.integers(0, 8, x[:, :, 192:224].shape).astype(f"u{item.itemsize}").view(item)
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(2, 8), (4, 4), (8, 2)])
def test_bytes_of_hostile_numbers(bits: tuple[int, int], dtype: str) -> None:
    shape = (1, 1, 288, 32)
    start = np.zeros(1, np.int32)
    for isa in ISAS:
        cache = Cache(KiviSpec(*bits, residual=32), dtype, hostile(dtype, shape), hostile(dtype, shape), start)
        with cpu.force(isa):
            cache.grow(288)
        segments, _, _, bad = cache.reference()
        assert bad == cache.bad == 0
        same_segments(segments, cache.segments)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_groups_that_are_not_finite_are_counted(wrong: float, isa: str) -> None:
    for dtype in DTYPES:
        k, v = numbers((2, 2, 100, 32), dtype, 1), numbers((2, 2, 100, 32), dtype, 2)
        k[1, 0, 5, 3] = k[1, 0, 9, 3] = k[0, 1, 40, 31] = v[0, 0, 2, 17] = wrong
        k[0, 0, 99, 0] = v[0, 0, 99, 0] = wrong  # still in the window
        cache = Cache(KiviSpec(4, 4, v_group=16, residual=32), dtype, k, v, np.zeros(2, np.int32))
        with cpu.force(isa):
            cache.grow(100)
        segments, _, _, bad = cache.reference()
        assert bad == cache.bad == 3
        same_segments(segments, cache.segments)


def test_bytes_do_not_depend_on_the_schedule() -> None:
    spec = KiviSpec(4, 2, residual=64, sink=5)
    at_once, stepwise = (make(spec, "BF16", 32, 700) for _ in range(2))
    at_once.grow(700)
    stepwise.grow(3)
    while stepwise.slots < 700:
        stepwise.grow(1)
    same_segments(at_once.segments, stepwise.segments)
    assert len(stepwise.segments) == 2


def tolerance(isa: str, dtype: str) -> float:
    """Relative to the largest output, in FP32 from the kernel: BF16 products round the probabilities."""
    return 4e-3 if (isa, dtype) == ("avx512_bf16", "BF16") else 1e-5


def check(cache: Cache, k: Array, v: Array, isa: str, visible: int, heads: int, rows: int, **options: object) -> None:
    q = numbers((cache.batch, heads, rows, cache.head_dim), cache.dtype, 3) / 4
    arguments = {"scaling": cache.head_dim**-0.5, **options}
    with cpu.force(isa):
        out, lse = cache.attend(q, visible, **arguments)  # type: ignore[arg-type]
    expected, log = attention(*(x.astype(np.float64) for x in (q, k, v)), cache.start, **arguments)  # type: ignore[arg-type]
    size = np.abs(expected).max()
    assert np.abs(out - expected).max() <= tolerance(isa, cache.dtype) * size, (isa, cache.dtype)
    seen = np.isfinite(log)
    assert np.array_equal(seen, np.isfinite(lse))
    assert (lse[~seen] == -np.inf).all()
    assert np.abs(lse[seen] - log[seen]).max(initial=0) <= tolerance(isa, cache.dtype) * max(1, np.abs(log[seen]).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPECS)
def test_attention(name: str, isa: str) -> None:
    for dtype in DTYPES if name in ("k4v4", "k2v2") else ["BF16"]:
        cache, _, k, v = grown(name, dtype)
        cache = dataclasses.replace(cache, segments=cache.segments, threads=2)
        cache.window_k, cache.window_v, cache.sink_k, cache.sink_v = (
            getattr(grown(name, dtype)[0], x).copy() for x in ("window_k", "window_v", "sink_k", "sink_v")
        )
        check(cache, k, v, isa, cache.slots, 2, 3)
        cache.show(cache.slots, cache.slots + 1)
        now = slice(cache.slots, cache.slots + 1)
        k, v = np.concatenate([k, cache.k[:, :, now]], 2), np.concatenate([v, cache.v[:, :, now]], 2)
        for heads in (2, 8, 14):
            check(cache, k, v, isa, cache.slots + 1, heads, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_everything(dtype: str, isa: str) -> None:
    cache, _, k, v = grown("k4v4", dtype)
    rng = np.random.default_rng(4)
    sinks = rng.standard_normal(4).astype(np.float32)
    for shape in ((3, 1, 5, cache.slots), (3, 4, 5, cache.slots)):
        mask = rng.random(shape) < 0.3
        mask[0, :, 2] = False  # a query that sees nothing
        mask[1, :, 3, :600] = False  # whole segments
        check(cache, k, v, isa, cache.slots, 4, 5, mask=mask)
        check(cache, k, v, isa, cache.slots, 4, 5, mask=mask, softcap=2.5, sinks=sinks)


@pytest.mark.parametrize("isa", ISAS)
def test_short_and_empty_rows(isa: str) -> None:
    """Rows that are shorter than the sinks, than the window, and without a token."""
    start = np.array([0, 60, 100, 37], np.int32)
    cache = make(KiviSpec(4, 4, residual=32, sink=8), "BF16", 32, 101, start)
    cache.grow(66)
    _, k, v, _ = cache.reference()
    check(cache, k, v, isa, 66, 4, 1)
    while cache.slots < 100:
        cache.grow(1)
    _, k, v, _ = cache.reference()
    check(cache, k, v, isa, 100, 4, 1)
    cache.show(100, 101)
    check(cache, np.append(k, cache.k[:, :, 100:], 2), np.append(v, cache.v[:, :, 100:], 2), isa, 101, 4, 2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_batch_padding_and_number_of_threads(dtype: str, isa: str) -> None:
    batch = make(KiviSpec(2, 4, residual=64, sink=3), dtype, 64, 680)
    q = numbers((3, 6, 4, 64), dtype, 3)
    with cpu.force(isa):
        batch.grow(680)
        out, lse = batch.attend(q, 680, scaling=0.1)
        for threads in (1, 5):
            batch.threads = threads
            for a, b in zip((out, lse), batch.attend(q, 680, scaling=0.1), strict=True):
                assert a.tobytes() == b.tobytes()
        for b, padding in enumerate(START):
            alone = Cache(
                batch.spec,
                dtype,
                batch.k[b : b + 1, :, padding:],
                batch.v[b : b + 1, :, padding:],
                np.zeros(1, np.int32),
            )
            alone.grow(680 - padding)
            same_segments([segment[b : b + 1] for segment in batch.segments], alone.segments)
            for a, c in zip((out, lse), alone.attend(q[b : b + 1], 680 - padding, scaling=0.1), strict=True):
                assert a[b : b + 1].tobytes() == c.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, 2), (2, 2)])
def test_error_is_at_most_twice_that_of_plain_torch(bits: tuple[int, int], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    cache = make(KiviSpec(*bits), dtype, 128, 1100, np.zeros(1, np.int32))
    cache.grow(1100)
    k, v = dequantized(cache)
    q = numbers((1, 8, 1, 128), dtype, 3)
    expected, _ = attention(*(x.astype(np.float64) for x in (q, k, v)), cache.start, scaling=128**-0.5)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).to(kind) for x in (q, np.repeat(k, 4, 1), np.repeat(v, 4, 1)))
    )

    def error(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((x - expected) ** 2)))

    for isa in ISAS:
        with cpu.force(isa):
            out, _ = cache.attend(q, 1100, scaling=128**-0.5, out_f32=False)
        assert error(out) <= 2 * error(plain.float().numpy()), isa


def dequantized(cache: Cache) -> tuple[Array, Array]:
    """Keys and values that the cache stands for (the reference without its bytes)."""
    from helpers.kv_cases import dequantize, quantize

    k, v = cache.k.copy(), cache.v.copy()
    spec, (b, h, _, d) = cache.spec, cache.k.shape
    _, keys, values = cache.quantized(0)
    groups = k[:, :, :keys].reshape(b, h, -1, spec.group, d).swapaxes(-1, -2)
    k[:, :, :keys] = (
        dequantize(*quantize(groups, spec.k_bits, cache.dtype), cache.dtype).swapaxes(-1, -2).reshape(b, h, keys, d)
    )
    groups = v[:, :, :values].reshape(b, h, values, -1, spec.value_group)
    v[:, :, :values] = dequantize(*quantize(groups, spec.v_bits, cache.dtype), cache.dtype).reshape(b, h, values, d)
    return k, v


@pytest.mark.parametrize("isa", ISAS)
def test_scores_far_apart(isa: str) -> None:
    """One token that outweighs all others, and scores that overflow exp without the maximum."""
    cache = make(KiviSpec(4, 4, residual=32), "BF16", 32, 600, np.zeros(1, np.int32), 1)
    cache.k[:, :, 17] = 100.0
    cache.grow(600)
    _, k, v, _ = cache.reference()
    q = np.ones((1, 1, 1, 32), np.float32)
    with cpu.force(isa):
        out, lse = cache.attend(q, 600, scaling=1.0)
    assert np.abs(out - v[:, :, 17:18]).max() <= 1e-2 * np.abs(v).max()
    assert np.abs(lse - k[0, 0, 17].sum()).max() <= 1e-2 * 3200


def test_products_of_bf16_are_used_where_the_cpu_has_them() -> None:
    for isa in ISAS:
        with cpu.force(isa):
            assert native.implementation("BF16") == isa
            assert native.implementation("F32") == ("avx512" if isa == "avx512_bf16" else isa)
            assert native.implementation("F16") == native.implementation("F32")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F8_E4M3"}, {"k_bits": 3}, {"v_bits": 16}, {"head_dim": 24}, {"head_dim": 528}, {"group": 48},
        {"v_group": 48}, {"residual": 100}, {"sink": -1}, {"capacity": 0}, {"tokens": -1},
    ],
)  # fmt: skip
def test_calls_that_do_not_exist(change: dict[str, object]) -> None:
    cache = make(KiviSpec(), "BF16", 128, 200)
    cache.grow(200)
    with pytest.raises(KvCacheError, match="expected"):
        dataclasses.replace(cache.call(), **change).check()  # type: ignore[arg-type]


def test_too_little_room() -> None:
    cache = make(KiviSpec(residual=32), "BF16", 128, 200)
    cache.grow(200)
    call = dataclasses.replace(cache.call(), segments=[])
    zeros = (0, 0, 0)
    with pytest.raises(KvCacheError, match="segments"):
        native.attend(call, 200, 0, zeros, 1, 1, 1.0, 0.0, 0, 0, zeros, 0, True, 0, 1)
    with pytest.raises(KvCacheError, match="segments"):
        native.flush(call, 100, 0, 0, (0, 0, 0, 0, 0, 0), 1)
    with pytest.raises(KvCacheError, match="window"):
        native.attend(cache.call(), 202, 0, zeros, 1, 1, 1.0, 0.0, 0, 0, zeros, 0, True, 0, 1)
    with pytest.raises(KvCacheError, match="visible"):
        native.attend(cache.call(), 199, 0, zeros, 1, 1, 1.0, 0.0, 0, 0, zeros, 0, True, 0, 1)
    with pytest.raises(KvCacheError, match="pending"):
        native.flush(cache.call(), 1, 4096, 0, (0, 0, 0, 0, 0, 0), 1)
