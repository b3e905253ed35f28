"""What leaves the window of a cache has the bytes that the layout defines, whatever the lanes' order and the launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kv_device import VARIANTS, DeviceCache, cache

from bitforbit.cuda.kv import KvCall, flush
from bitforbit.errors import UsageError
from bitforbit.kv.layout import KvLayout
from cuda_shim.emulation import EmulatedQueue, run_everywhere
from helpers.kv_cases import DTYPES

names = pytest.mark.parametrize("name", VARIANTS)


def check(found: DeviceCache) -> None:
    segments, _, _, bad = found.reference()
    assert found.bad == bad
    for got, expected in zip(found.segments, segments, strict=True):
        np.testing.assert_array_equal(got, expected)


@names
def test_a_prompt_and_the_tokens_after_it(queue: Any, name: str) -> None:
    found = cache(queue, VARIANTS[name], 210, [0, 37], sink=3)
    for tokens in (173, 1, 1, 33, 1, 1):
        found.grow(tokens)
    check(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["64-k2v2", "80-k8v4"])
def test_dtypes(queue: Any, name: str, dtype: str) -> None:
    found = cache(queue, VARIANTS[name], 200, [0], heads=1, dtype=dtype)
    found.grow(199)
    found.grow(1)
    check(found)


def test_segments(queue: Any) -> None:
    found = cache(queue, VARIANTS["32-k4v4"], 1100, [0, 20, 1099], heads=1, sink=1)
    for tokens in (500, 580, 1, 19):
        found.grow(tokens)
    check(found)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 63, 64, 65, 96, 97])
def test_few_tokens(queue: Any, tokens: int) -> None:
    for start in (0, tokens):
        found = cache(queue, VARIANTS["32-k4v4"], tokens + 2, [start], heads=1)
        for count in (tokens, 1, 1):
            found.grow(count)
        check(found)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", DTYPES)
def test_hostile_numbers(queue: Any, dtype: str) -> None:
    """Constant groups, zeros of both signs, subnormal numbers, the largest ones, all magnitudes, ties."""
    found = cache(queue, (64, VARIANTS["64-k8v2"][1]), 192, [0], heads=1, dtype=dtype)
    kind = DTYPES[dtype]
    random, limits = np.random.default_rng(5), np.finfo(np.float16) if dtype == "F16" else np.finfo(np.float32)
    least = np.float32(2.0**-24 if dtype == "F16" else 2.0**-133 if dtype == "BF16" else 2.0**-149)
    largest = float(limits.max) * (0.99 if dtype == "BF16" else 1)
    rows = [
        np.full(64, 3.0), np.full(64, -0.0), random.choice([0.0, -0.0], 64), least * random.integers(-3, 4, 64),
        random.choice([-largest, largest], 64), random.choice([-largest, 0.0], 64), np.full(64, largest),
        np.exp2(random.uniform(-14 if dtype == "F16" else -126, 14, 64)), np.arange(64) - 31.5, -np.arange(64.0),
    ]  # fmt: skip
    with np.errstate(over="ignore"):
        hostile = np.array(rows, np.float32).astype(kind).astype(np.float32)
    places = random.integers(0, len(hostile), 192)
    found.v[0, 0] = hostile[places]
    found.k[0, 0] = np.tile(hostile[np.arange(64) % len(hostile)].T, (3, 1))  # a channel has a kind of numbers
    found.grow(160)
    found.grow(32)
    check(found)


def test_nan_and_infinity(queue: Any) -> None:
    found = cache(queue, VARIANTS["64-k2v2"], 200, [0, 5])
    found.k[0, 1, 70, 3], found.k[1, 0, 80, 9], found.v[0, 0, 20, 63], found.v[1, 1, 30, 5] = (
        np.nan,
        np.inf,
        -np.inf,
        np.nan,
    )
    found.grow(200)
    assert found.bad == 4
    check(found)


def test_memory_and_races() -> None:
    def run(queue: Any) -> list[np.ndarray]:
        found = cache(queue, VARIANTS["80-k8v4"], 300, [0, 130], heads=1, sink=2)
        for tokens in (270, 1, 29):
            found.grow(tokens)
        return found.segments

    run_everywhere(run)


def test_a_counter_says_how_many_slots_there_are(queue: Any) -> None:
    """As a replayed graph sees it: the launch was made for more of them."""
    found = cache(queue, VARIANTS["32-k4v4"], 150, [0, 9], by_counter=True)
    found.grow(100)
    for _ in range(50):
        found.grow(1)
    check(found)


def test_sizes_are_those_of_the_layout() -> None:
    """The text counts a record's bytes itself."""
    for head_dim, spec in VARIANTS.values():
        layout = KvLayout(spec, head_dim)
        bits = spec.key_bits_per_element + spec.value_bits_per_element
        assert layout.record_bytes == 512 * head_dim * bits / 8


def test_arguments_that_are_refused() -> None:
    queue = EmulatedQueue()

    def call(**changes: Any) -> KvCall:
        fields: dict[str, Any] = {
            "batch": 1, "heads": 1, "head_dim": 64, "k_bits": 4, "v_bits": 4, "group": 32, "v_group": 32,
            "residual": 64, "sink": 0, "capacity": 65, "dtype": "BF16", "segments": 0, "window_k": 0, "window_v": 0,
            "sink_k": 0, "sink_v": 0, "start": 0, "tokens": 0,
        }  # fmt: skip
        return KvCall(**fields | changes)

    for changes in ({"window_k": 8}, {"start": 2}, {"segments": 4}):
        with pytest.raises(UsageError, match="addresses on 16 bytes"):
            flush(queue, call(**changes), 100, 0)
    for head_dim in (8, 272, 48):
        with pytest.raises(UsageError, match="head dimension that is a multiple"):
            flush(queue, call(head_dim=head_dim), 100, 0)
    with pytest.raises(UsageError, match="rows and heads together"):
        flush(queue, call(batch=1 << 15, heads=8), 100, 0)
    with pytest.raises(UsageError, match="a window of at least a group"):
        flush(queue, call(residual=0), 100, 0)
    with pytest.raises(UsageError, match="expected one of BF16, F16, F32"):
        flush(queue, call(dtype="F64"), 100, 0)
    for place, strides in ((8, (64,) * 6), (16, (64, 64, 60, 64, 64, 64))):
        with pytest.raises(UsageError, match="make them contiguous"):
            flush(queue, call(), 100, 0, place, 16, strides)
    flush(queue, call(tokens=5), 5, 0)
    flush(queue, call(residual=128), 100, 0, 16, 16, (64,) * 6)
    assert not queue.launcher.launches
