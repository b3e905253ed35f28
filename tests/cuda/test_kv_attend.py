"""Attention over a quantized cache: as close to FP64 as plain BF16 attention is, the same bits in any company."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kv_device import VARIANTS, DeviceCache, bf16, cache, check, queries

from bitforbit.cuda.kv import workspace_bytes
from bitforbit.errors import UsageError
from cuda_shim.emulation import EmulatedQueue, run_everywhere

FOUR = VARIANTS["32-k4v4"]
attending = importlib.import_module("bitforbit.cuda.kv.attend")  # the package has a function of that name


def filled(queue: Any, name: str, slots: int, start: list[int], **settings: Any) -> DeviceCache:
    """A cache of so many slots, and a token more that is not in it."""
    found = cache(queue, VARIANTS[name], slots + 1, start, **settings)
    found.grow(slots)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(queue: Any, name: str) -> None:
    """Every pair of bits, size of groups and of heads; a row with padding; sink tokens."""
    found = filled(queue, name, 200, [0, 37], sink=3)
    check(found, queries(found, 8, 1), 201, scaling=found.head_dim**-0.5)


@pytest.mark.parametrize("name", VARIANTS)
def test_peaked_queries(queue: Any, name: str) -> None:
    """Large scores, whose errors are errors of exponents: query times scale needs more bits than BF16 has."""
    for seed in range(3):
        found = filled(queue, name, 700, [0], heads=1, seed=seed)
        check(found, bf16(3 * queries(found, 8, 1, seed + 10)), 701, scaling=found.head_dim**-0.5)


@pytest.mark.parametrize("slots", [0, 1, 31, 32, 33, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129])
def test_edges_of_tiles_and_of_the_window(queue: Any, slots: int) -> None:
    for sink in (0, 1, 40):
        found = filled(queue, "32-k4v4", slots, [0, min(slots, 30), slots], sink=sink, heads=1)
        check(found, queries(found, 1, 1), slots + 1, scaling=0.2)


@pytest.mark.parametrize("slots", [543, 544, 545, 1100])
def test_segments(queue: Any, slots: int) -> None:
    """V ends before, at and after the end of a segment."""
    found = filled(queue, "32-k4v4", slots, [0, 20], heads=1)
    check(found, queries(found, 2, 1), slots + 1, scaling=0.2)


@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (3, 1), (4, 2), (5, 5), (1, 9), (8, 3)])
def test_queries(queue: Any, heads: int, rows: int) -> None:
    """Heads that share keys, tokens that came together: they see what was there before them."""
    found = filled(queue, "32-k4v4", 150, [0, 3])
    check(found, queries(found, 2 * heads, rows), 150, scaling=0.2)


def test_an_empty_row_gives_zeros(queue: Any) -> None:
    found = filled(queue, "32-k4v4", 100, [100, 0])
    out, lse = check(found, queries(found, 4, 2), 100, scaling=0.2)
    assert not out[0].any()
    assert np.isneginf(lse[0]).all()
    assert out[1].all()


@pytest.mark.parametrize("heads", [1, 4])
def test_masks(queue: Any, heads: int) -> None:
    found = filled(queue, "32-k4v4", 700, [0, 41], sink=2)
    q = queries(found, 4, 3)
    mask = np.random.default_rng(2).random((2, heads, 3, 700)) < 0.3
    mask[0, :, 1] = False
    out, _ = check(found, q, 700, scaling=0.2, mask=mask)
    assert not out[0, :, 1].any()
    whole = np.ones((2, 1, 3, 700), bool)
    np.testing.assert_array_equal(
        found.attend(q, 700, scaling=0.2, mask=whole)[0], found.attend(q, 700, scaling=0.2)[0]
    )


@pytest.mark.parametrize("softcap", [0.7, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(queue: Any, softcap: float, sinks: bool) -> None:
    found = filled(queue, "64-k8v2", 150, [0, 140])
    logits = np.array([-1e30, 0, 5, 90], np.float32) if sinks else None
    check(found, queries(found, 4, 1), 151, scaling=0.3, softcap=softcap, sinks=logits)


def test_one_token_takes_all(queue: Any) -> None:
    """Scores beyond the range of exp: weights are 0 or 1."""
    found = filled(queue, "32-k4v4", 700, [0])
    out, lse = found.attend(300 * queries(found, 2, 1), 701, scaling=1.0)
    assert np.isfinite(lse).all()
    assert (lse > 1000).all()
    assert (np.abs(out).max(-1) > 0.5).all()
    assert np.abs(out).max() <= np.abs(found.v).max() + 1


def test_results_as_bf16(queue: Any) -> None:
    found = filled(queue, "32-k4v4", 130, [0])
    q = queries(found, 4, 2)
    wide, rounded = (found.attend(q, 130, scaling=0.2, out_f32=f32)[0] for f32 in (True, False))
    assert np.abs(rounded - wide).max() <= np.abs(wide).max() * 2**-8
    assert (wide != rounded).any()


def test_the_same_bits_in_any_company(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other rows, padding, other queries, launches of fewer queries, a launch for more slots than there are."""
    found = filled(queue, "32-k4v4", 1100, [0, 333], sink=1)
    q = queries(found, 6, 5)
    whole, lse = found.attend(q, 1100, scaling=0.2)

    for number in range(5):
        np.testing.assert_array_equal(
            found.attend(q[:, :, number : number + 1], 1100, scaling=0.2)[0][:, :, 0], whole[:, :, number]
        )
    alone = cache(queue, FOUR, 1100 - 333, [0], sink=1)
    alone.k, alone.v = found.k[1:, :, 333:1100], found.v[1:, :, 333:1100]
    alone.grow(1100 - 333)
    np.testing.assert_array_equal(alone.attend(q[1:], 1100 - 333, scaling=0.2)[0], whole[1:])

    monkeypatch.setattr(attending, "WORKSPACE_LIMIT", 1)
    launched = len(queue.launcher.launches)
    np.testing.assert_array_equal(found.attend(q, 1100, scaling=0.2)[0], whole)
    assert len(queue.launcher.launches) - launched == 4  # two groups of 8 queries

    found.by_counter = True
    got = found.attend(q, 1100, scaling=0.2)
    np.testing.assert_array_equal(got[0], whole)
    np.testing.assert_array_equal(got[1], lse)


def test_memory_and_races() -> None:
    def run(queue: Any) -> list[np.ndarray]:
        found = filled(queue, "16-k2v4", 620, [0, 590], heads=1, sink=2)
        mask = np.random.default_rng(2).random((2, 1, 1, 621)) < 0.7
        return list(found.attend(queries(found, 2, 1), 621, scaling=0.2, mask=mask, sinks=np.ones(2, np.float32)))

    run_everywhere(run)


def test_arguments_that_are_refused() -> None:
    queue = EmulatedQueue()
    found = cache(queue, FOUR, 10, [0])
    call, _ = found.on_device()
    call = replace(call, tokens=9)

    def run(**changes: Any) -> None:
        fields: dict[str, Any] = {
            "call": call, "visible": 10, "q": 0, "q_strides": (64, 32, 32), "queries_per_head": 1, "query_rows": 1,
            "scaling": 1.0, "softcap": 0.0, "sinks": 0, "mask": 0, "mask_strides": (0, 0, 0), "out": 0, "out_f32": True,
            "lse": 0, "workspace": 0,
        }  # fmt: skip
        attending.attend(queue, **fields | changes)

    with pytest.raises(UsageError, match="expected a BF16 cache, got F16"):
        run(call=replace(call, dtype="F16"))
    for changes in ({"q": 4}, {"q_strides": (64, 30, 32)}, {"out": 2}, {"workspace": 8}):
        with pytest.raises(UsageError, match="make them contiguous"):
            run(**changes)
    with pytest.raises(UsageError, match="expected 9 slots or more"):
        run(visible=8)
    run(query_rows=0)
    assert not queue.launcher.launches
    # Partial results of 8 queries, for each of two heads, and an item: 4 bytes, 32 channels and two norms.
    assert workspace_bytes(call, 10, 3, 2) == 4 * 8 * 2 * 34
