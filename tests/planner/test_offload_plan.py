"""Blocks elsewhere: what stays, what is needed for the rest, and the predicted order of speeds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_configs import CONFIGS

from bitforbit.kv.spec import KiviSpec
from bitforbit.planner import Elsewhere, Gpu, KvSetting, Request, Split, find_gpu, from_config, make_plan
from bitforbit.planner.offload import Offload, steady_seconds
from bitforbit.planner.request import streaming_of

OWN = KvSetting("16")
LLAMA = from_config(CONFIGS["llama-3.1-8b"])
REQUEST = Request(LLAMA, Gpu("x", 10 * 10**9, 1e12, link=3e10), context=2048, reserve=0)


def offloads(request: Request) -> dict[str, Offload]:
    return {row.offload.method: row.offload for row in make_plan(request).offload}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["llama-3.1-8b", "mistral-small-3", "qwen3-8b"]),
    st.sampled_from(["bf16", "exact", "fused"]),
    st.integers(1, 3),
    st.integers(5, 40),
    st.sampled_from([None, 0, 2, 8]),
)
def test_nothing_is_lost_and_nothing_overflows(
    name: str, method: str, gpus: int, gigabytes: int, host: int | None
) -> None:
    elsewhere = Elsewhere(None if host is None else host * 10**9, 3e10, 3e9)
    request = Request(from_config(CONFIGS[name]), Gpu("x", gigabytes * 10**9), Split(1, gpus), context=1000, reserve=0)
    streaming = streaming_of(request, method, OWN, 1000)
    plan = streaming.plan(request.capacity, elsewhere)
    if plan is None:
        assert streaming.plan(request.capacity * 10, elsewhere) is not None
        return
    assert plan.blocks == len(streaming.blocks) == len(streaming.whole.layers) + 1
    assert len(plan.resident) == gpus
    assert plan.memory.total <= request.capacity
    streamed = streaming.blocks[plan.blocks - plan.streamed :]
    slots = streaming.slots(request.capacity)
    assert plan.slots == min(len(streamed), slots)
    assert 1 <= slots <= (3 if method != "bf16" else 1)
    assert slots == 1 or plan.slot_bytes <= request.capacity / 2
    largest = sum(sorted(block.nbytes for block in streamed)[-plan.slots :] if streamed else [])
    assert largest <= plan.slot_bytes <= 1.125 * largest
    in_host = len(streamed) - plan.disk_blocks
    assert plan.host_bytes == sum(block.nbytes for block in streamed[:in_host])
    assert plan.disk_bytes == sum(block.stored for block in streamed[in_host:])
    assert host is None or plan.host_bytes <= host * 10**9
    assert host is not None or not plan.disk_blocks
    larger = streaming.plan(request.capacity + 10**9, elsewhere)
    assert larger is not None
    assert sum(larger.resident) >= sum(plan.resident)


def test_weights_are_counted_once() -> None:
    """What is kept, what is streamed and the slots: the whole model's bytes and the slots."""
    for method, each in offloads(REQUEST).items():
        whole = streaming_of(REQUEST, method, OWN, 2048).whole
        assert each.memory.weights - each.slot_bytes + each.host_bytes == pytest.approx(whole.weights, abs=10**4)
        assert each.memory.kv == whole.kv(streaming_of(REQUEST, method, OWN, 2048).load)


def test_compressed_keeps_more_and_is_predicted_to_be_faster() -> None:
    plan = make_plan(REQUEST)
    found = {row.offload.method: row for row in plan.offload}
    kept = {method: sum(row.offload.resident) for method, row in found.items()}
    assert kept["bf16"] < kept["exact"] <= kept["fused"]
    assert found["bf16"].over_bf16 == 1
    assert (found["fused"].over_bf16 or 0) > (found["exact"].over_bf16 or 0) > 1.4
    assert any(line.startswith("offload fits: fused, KV 16, ") for line in plan.advice)


def test_the_ratio_does_not_need_bf16_among_the_modes() -> None:
    alone = make_plan(replace(REQUEST, methods=("exact",))).offload[0]
    beside = next(row for row in make_plan(REQUEST).offload if row.offload.method == "exact")
    assert alone == beside


def test_what_fits_is_not_planned_elsewhere() -> None:
    plan = make_plan(replace(REQUEST, gpu=find_gpu("H100")))
    assert all(row.fits for row in plan.rows)
    assert plan.offload == ()
    mixed = make_plan(replace(REQUEST, gpu=Gpu("x", 14 * 10**9, 1e12, link=3e10)))
    assert (
        [row.offload.method for row in mixed.offload] == [row.method for row in mixed.rows if not row.fits] == ["bf16"]
    )
    assert not mixed.advice


def test_disk_is_slower_and_files_are_smaller_than_tiles() -> None:
    host = offloads(REQUEST)["exact"]
    disk = offloads(replace(REQUEST, elsewhere=Elsewhere(0, 3e10, 3e9)))["exact"]
    assert disk.disk_blocks == disk.streamed == host.streamed
    assert disk.host_bytes == 0
    assert disk.disk_bytes < host.host_bytes
    assert (disk.speed or 0) < (host.speed or 0) / 5
    unknown = offloads(replace(REQUEST, elsewhere=Elsewhere(0, 3e10, None)))["exact"]
    assert unknown.speed is None
    assert make_plan(replace(REQUEST, elsewhere=Elsewhere())).offload[0].over_bf16 is None


def test_on_a_cpu_the_rest_is_on_disk() -> None:
    plan = make_plan(replace(REQUEST, gpu=find_gpu("CPU:8GB")))
    for row in plan.offload:
        assert row.offload.host_bytes == 0
        assert row.offload.disk_blocks == row.offload.streamed > 0
        assert row.offload.speed is not None
    assert any(line.endswith("blocks in memory") for line in plan.advice)


def test_many_gpus() -> None:
    """The first one has the slots and the cache of what is streamed, the others as many blocks as they hold."""
    one, two = (
        offloads(REQUEST)["exact"],
        offloads(replace(REQUEST, split=Split(1, 2), gpu=Gpu("x", 6 * 10**9, link=3e10)))["exact"],
    )
    first, second = two.resident
    assert first < second
    assert two.memory.total <= 6 * 10**9
    assert one.streamed > 0
    assert make_plan(replace(REQUEST, split=Split(2, 1), gpu=Gpu("x", 4 * 10**9))).offload == ()


def test_what_does_not_even_go_so() -> None:
    tight = replace(REQUEST, context=131072, gpu=Gpu("x", 9 * 10**9, 1e12, link=3e10), methods=("exact",))
    plan = make_plan(tight)
    assert plan.offload == ()
    line = next(each for each in plan.advice if "with offload" in each)
    tokens = int(line.split()[0].replace(",", ""))
    assert make_plan(replace(tight, context=tokens)).offload[0].offload.streamed > 20
    assert make_plan(replace(tight, context=tokens + 1)).offload == ()


@pytest.mark.parametrize(("dtype", "gigabytes"), [("float16", 5), ("float32", 8), ("float8_e4m3fn", 5)])
def test_other_dtypes(dtype: str, gigabytes: int) -> None:
    """Some have no compressed size that could be told without the weights."""
    shape = from_config({**CONFIGS["llama-3.1-8b"], "torch_dtype": dtype})
    gpu, elsewhere = Gpu("x", gigabytes * 10**9, link=3e10), Elsewhere(10**9, 3e10, 3e9)
    found = offloads(replace(REQUEST, shape=shape, gpu=gpu, elsewhere=elsewhere))
    assert set(found) == ({"bf16"} if dtype == "float32" else {"bf16", "exact", "fused"})
    assert all(each.disk_bytes and each.host_bytes for each in found.values())


def test_quantized_caches_keep_more_blocks() -> None:
    both = replace(REQUEST, context=16384, methods=("exact",), caches=(OWN, KvSetting("4", KiviSpec(4, 4))))
    own, four = (row.offload for row in make_plan(both).offload)
    assert sum(four.resident) > sum(own.resident)


def test_tied_heads_are_no_blocks() -> None:
    tied = from_config({**CONFIGS["llama-3.1-8b"], "tie_word_embeddings": True})
    found = offloads(replace(REQUEST, shape=tied))["exact"]
    assert found.blocks == len(tied.layers)
    assert found.slot_bytes < offloads(REQUEST)["exact"].slot_bytes


@pytest.mark.parametrize(
    ("stay", "fetches", "computing", "slots", "expected"),
    [
        (0.0, [], [], 0, 0.0),
        (2.0, [], [], 0, 2.0),
        (0.0, [1.0] * 4, [0.1] * 4, 3, 4.0),  # the link never rests
        (0.0, [0.1] * 4, [1.0] * 4, 3, 4.0),  # nor does the GPU
        (9.0, [1.0] * 2, [0.1] * 2, 3, 9.2),  # all of it comes while the rest runs
        (9.0, [1.0] * 6, [0.0] * 6, 3, 12.0),  # three of six do
        (0.0, [1.0] * 4, [1.0] * 4, 1, 8.0),  # one slot: nothing overlaps
        (0.0, [1.0] * 4, [1.0] * 4, 2, 4.0),
    ],
)
def test_steady_seconds(stay: float, fetches: list[float], computing: list[float], slots: int, expected: float) -> None:
    assert steady_seconds(stay, fetches, computing, slots) == pytest.approx(expected)


@given(
    st.floats(0, 5), st.lists(st.tuples(st.floats(0.01, 2), st.floats(0, 2)), min_size=1, max_size=9), st.integers(1, 4)
)
def test_steady_seconds_is_within_its_bounds(stay: float, blocks: list[tuple[float, float]], slots: int) -> None:
    fetches, computing = zip(*blocks, strict=True)
    seconds = steady_seconds(stay, fetches, computing, slots)
    busiest = max(sum(fetches), stay + sum(computing))
    assert busiest - 1e-6 <= seconds <= stay + sum(fetches) + sum(computing) + 1e-6
