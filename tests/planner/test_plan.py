"""The plan's arithmetic: monotone, the longest context is the longest, splits add up, bad input is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_configs import CONFIGS

from bitforbit.errors import IoModelError, KvSpecError, PlanError
from bitforbit.iomodel import ModelShape
from bitforbit.iomodel import step_traffic as io_traffic
from bitforbit.kv.spec import KiviSpec
from bitforbit.planner import GPUS, Gpu, KvSetting, Load, Request, Split, Storage, find_gpu, from_config, make_plan
from bitforbit.planner.request import longest_context, peak, stages_of
from bitforbit.planner.speed import step_traffic
from bitforbit.planner.weights import METHODS

OWN = KvSetting("16")
CACHES = (OWN, KvSetting("8", KiviSpec(8, 8)), KvSetting("4", KiviSpec(4, 4)), KvSetting("2", KiviSpec(2, 2, sink=4)))
LLAMA = from_config(CONFIGS["llama-3.1-8b"])


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["llama-3.1-8b", "mistral-small-3", "qwen3-8b"]),
    st.sampled_from(METHODS),
    st.sampled_from(CACHES),
    st.sampled_from([Split(), Split(1, 2), Split(2, 1), Split(4, 3)]),
    st.integers(1, 5),
    st.integers(20, 100),
)
def test_the_longest_context_fits_and_one_more_does_not(
    name: str, method: str, kv: KvSetting, split: Split, batch: int, gigabytes: int
) -> None:
    request = Request(from_config(CONFIGS[name]), Gpu("x", gigabytes * 10**9), split, batch=batch)
    stages, load = stages_of(request, method, kv), Load(1, batch)
    longest = longest_context(stages, load, request.capacity)
    if longest:
        assert peak(stages, replace(load, context=longest)).total <= request.capacity
    assert peak(stages, replace(load, context=longest + 1)).total > request.capacity


@pytest.mark.parametrize("method", METHODS)
def test_splits_add_up(method: str) -> None:
    request = Request(LLAMA, find_gpu("H100"))
    whole = stages_of(request, method, OWN)[0].weights
    stages = stages_of(replace(request, split=Split(1, 5)), method, OWN)
    assert sum(stage.weights for stage in stages) == pytest.approx(whole, abs=1000)
    assert [len(stage.layers) for stage in stages] == [6, 7, 7, 6, 6]
    half = stages_of(replace(request, split=Split(2, 1)), method, OWN)[0]
    assert half.weights == pytest.approx(whole / 2, rel=1e-3)
    assert half.kv(Load(4096)) == stages_of(request, method, OWN)[0].kv(Load(4096)) // 2


def test_more_gpus_than_heads_repeat_them() -> None:
    """Tensor parallel 32 over 8 key-value heads: a head on each GPU, four times in all."""
    one, many = (stages_of(Request(LLAMA, find_gpu("H100"), Split(n)), "bf16", OWN)[0] for n in (1, 32))
    assert many.kv(Load(1000)) == one.kv(Load(1000)) // 8


def test_tied_embeddings_are_on_both_ends() -> None:
    shape = from_config({**CONFIGS["llama-3.1-8b"], "tie_word_embeddings": True})
    one = stages_of(Request(shape, find_gpu("H100")), "bf16", OWN)
    two = stages_of(Request(shape, find_gpu("H100"), Split(1, 2)), "bf16", OWN)
    embedding = 2 * shape.embedding.elements
    assert sum(stage.weights for stage in two) == one[0].weights + embedding


def test_tiles_are_what_loading_reserves() -> None:
    pytest.importorskip("torch")
    from bitforbit.nn.gpu_specs import expected_tiles_bytes

    storage = Storage("exact", "BF16", tiles=True)
    for layer in LLAMA.layers[:1]:
        for matrix in layer.matrices:
            assert storage.nbytes(matrix) == expected_tiles_bytes(matrix.rows, matrix.cols)


def test_decoding_takes_what_the_policy_takes() -> None:
    pytest.importorskip("torch")
    from bitforbit.ops.gpu.policy import scratch_bytes

    sizes = [2 * m.elements for layer in LLAMA.layers for m in layer.matrices] + [2 * LLAMA.output.elements]
    assert stages_of(Request(LLAMA, find_gpu("H100")), "exact", OWN)[0].scratch(Load(64)) == scratch_bytes(sizes)


def test_speed_agrees_with_the_io_model() -> None:
    stage = stages_of(Request(LLAMA, find_gpu("H100")), "bf16", OWN)[0]
    moved = step_traffic(stage, Load(10_000, 3))
    expected = io_traffic(ModelShape.from_config(CONFIGS["llama-3.1-8b"]), 10_000, batch=3)
    assert moved.weights == expected.weights
    assert (moved.kv_read, moved.kv_written) == (expected.kv_read, expected.kv_written)
    assert moved.activations == pytest.approx(expected.activations, rel=0.3)


def test_speed_has_an_order() -> None:
    request = Request(
        LLAMA, find_gpu("H200"), context=65536, methods=("exact", "bf16", "fused"), caches=(OWN, CACHES[-1])
    )
    speeds = {(row.method, row.kv): row.speed or 0 for row in make_plan(request).rows}
    assert speeds["exact", "16"] < speeds["bf16", "16"] < speeds["fused", "16"] < speeds["fused", "2"]
    assert speeds["fused", "16"] < 1.45 * speeds["bf16", "16"]
    two = make_plan(replace(request, split=Split(2))).rows
    assert two[0].speed == pytest.approx(2 * speeds["exact", "16"], rel=0.01)
    apart = make_plan(replace(request, split=Split(1, 2))).rows  # one after the other: no faster
    assert apart[0].speed == pytest.approx(speeds["exact", "16"], rel=0.01)
    assert make_plan(replace(request, gpu=find_gpu("80GB"))).rows[0].speed is None


def test_experts_are_read_as_far_as_they_are_used() -> None:
    config = {**CONFIGS["llama-3.1-8b"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    stage = stages_of(Request(from_config(config), find_gpu("H100")), "bf16", OWN)[0]
    one, many = (step_traffic(stage, Load(10, batch)).weights for batch in (1, 64))
    expected = io_traffic(ModelShape.from_config(config), 10).weights
    assert one == pytest.approx(expected, rel=1e-4)  # but for the router
    assert one < many < stage.weights


def test_what_would_fit() -> None:
    request = Request(LLAMA, find_gpu("24GB"), context=131072, batch=4, methods=("exact",))
    advice = make_plan(request).advice
    assert "tokens fit with exact, KV 16" in advice[0]
    assert "GPUs fit (pipeline" in advice[-1]
    tokens = int(advice[0].split()[0].replace(",", ""))
    assert make_plan(replace(request, context=tokens)).rows[0].fits
    assert not make_plan(replace(request, context=tokens)).advice
    count = int(advice[-1].split()[0])
    assert make_plan(replace(request, split=Split(1, count))).rows[0].fits
    assert not make_plan(replace(request, split=Split(1, count - 1))).rows[0].fits
    single = make_plan(replace(request, batch=1)).advice
    assert "--kv 8 fits (lossy)" in single
    hopeless = Request(LLAMA, find_gpu("0.2GB"), context=10, reserve=0)
    assert make_plan(hopeless).advice == ("no number of such GPUs up to 64 fits; take larger ones, or a smaller model",)


def test_a_context_up_to_the_models_limit() -> None:
    request = Request(LLAMA, find_gpu("H200"), context=None)
    assert {row.context for row in make_plan(request).rows} == {131072}
    small = make_plan(replace(request, gpu=find_gpu("24GB"))).rows
    assert all(row.fits and row.context == row.longest < 131072 for row in small)


def test_caches_that_a_model_cannot_have() -> None:
    odd = from_config({**CONFIGS["llama-3.1-8b"], "head_dim": 72})
    plan = make_plan(Request(odd, find_gpu("H100"), context=10, caches=CACHES))
    assert {row.kv for row in plan.rows} == {"16"}
    assert "multiple of 16" in plan.skipped[0]
    with pytest.raises(KvSpecError):
        make_plan(Request(odd, find_gpu("H100"), context=10, caches=CACHES[1:]))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("80GB", 80 * 10**9), ("80 GiB", 80 << 30), ("h100", 80 << 30), ("RTX 4090", 24 << 30), ("4090", 24 << 30),
     ("a100-40gb", 40 << 30), ("cpu:1.5GB", 1_500_000_000)],
)  # fmt: skip
def test_gpus(text: str, nbytes: int) -> None:
    gpu = find_gpu(text)
    assert (gpu.memory, gpu.tiles) == (nbytes, not text.startswith("cpu"))


def test_gpus_of_the_io_model_agree() -> None:
    from bitforbit.iomodel.machine import find_machine

    for name in ("H100", "H200", "A100", "RTX 4090"):
        assert find_machine(name).levels[-1].bandwidth == find_gpu(name).bandwidth
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


def test_unknown_gpus() -> None:
    for text in ("GTX 1080", "", "80", "0GB", "-1GB", "GB"):
        with pytest.raises(PlanError, match="expected one of B200, H200, H100"):
            find_gpu(text)


def test_sizes() -> None:
    for text, nbytes in (("80GB", 80e9), ("80GiB", 80 * 2**30), ("500mb", 5e8), ("1 TB", 1e12), ("0.5MiB", 2**19)):
        assert find_gpu(text).memory == nbytes
        assert (find_gpu(f"CPU:{text}").name, find_gpu(f"CPU:{text}").memory) == ("CPU", nbytes)
    for text in ("CPU:16", "CPU:many", "cpu:0GB"):
        with pytest.raises(PlanError, match="expected a size such as CPU:16GB"):
            find_gpu(text)


def test_no_second_cpu_is_advised() -> None:
    for size, advice in (("4GB", "offload fits"), ("1MB", "take more memory, or a smaller model")):
        found = make_plan(
            Request(LLAMA, find_gpu(f"CPU:{size}"), context=100, methods=("exact",), caches=(OWN,))
        ).advice
        assert any(line.startswith(advice) for line in found), found
        assert not any("GPUs" in line for line in found)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(3), "divides 32 heads.*possible: 1, 2, 4, 8, 16, 32"),
        (Split(64), "possible: 1, 2"),
        (Split(1, 33), "at most one GPU per layer, of which there are 32"),
        (Split(0), "at least 1"),
    ],
)
def test_splits_that_do_not_go(split: Split, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(Request(LLAMA, find_gpu("H100"), split, context=10))


def test_experts_are_cut_too() -> None:
    """32 heads, experts 24 wide: 16 and 32 would cut them unevenly."""
    config = {
        **CONFIGS["llama-3.1-8b"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 24,
    }  # fmt: skip
    shape = from_config(config)
    with pytest.raises(PlanError, match=r"32 heads and the MLPs' width of 24, .*possible: 1, 2, 4, 8$"):
        make_plan(Request(shape, find_gpu("H100"), Split(16), context=10))
    assert make_plan(Request(shape, find_gpu("H100"), Split(8), context=10)).rows


def test_refused() -> None:
    with pytest.raises(PlanError, match="a batch and a chunk of at least 1"):
        Load(0)
    with pytest.raises(PlanError, match="bits per weight above 0"):
        Storage("exact", "BF16", True, 0.0)
    with pytest.raises(PlanError, match="a mode among bf16"):
        Storage("int4", "BF16", True)
    with pytest.raises(PlanError, match="--reserve: expected less than"):
        make_plan(Request(LLAMA, find_gpu("1GB"), reserve=2 * 10**9))
    floats = from_config({**CONFIGS["llama-3.1-8b"], "torch_dtype": "float32"})
    assert [row.method for row in make_plan(Request(floats, find_gpu("H100"), context=10)).rows] == ["bf16"]
    assert "depends on the weights" in make_plan(Request(floats, find_gpu("H100"), context=10)).skipped[0]
    with pytest.raises(PlanError, match="depends on the weights"):
        make_plan(Request(floats, find_gpu("H100"), context=10, methods=("exact",)))
    assert make_plan(Request(floats, find_gpu("H100"), context=10, bits=21)).rows[1].memory.weights < 22e9
    assert issubclass(PlanError, ValueError)
    assert IoModelError is not PlanError
