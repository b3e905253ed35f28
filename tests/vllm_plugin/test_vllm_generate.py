"""Tokens and their probabilities, those of stock vLLM in exact mode, and what stays compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

EAGER = {"enforce_eager": True}
SMALL = 2000
"""Bytes of the largest plain parameter in the models here: norms, biases and routers."""


@pytest.fixture(scope="module")
def single(models: Path, generate: Any) -> dict[str, Any]:
    """Results in one process, by name."""
    names = ("llama", "qwen3", "mixtral", "gemma", "other")
    runs: dict[str, dict[str, Any]] = {name: {"model": str(models / name)} for name in names}
    runs |= {f"{name}-packed": {"model": str(models / f"{name}-packed")} for name in names}
    runs["twice-packed"] = {"model": str(models / "twice-packed")}
    runs["loading"] = {"model": str(models / "twice"), "quantization": "bitforbit"}
    runs["fused"] = {**runs["llama-packed"], "environment": {"BITFORBIT_VLLM_MODE": "fused"}}
    runs["headless"] = {"model": str(models / "headless-packed")}
    adapter = {"enable_lora": True, "max_lora_rank": 8, "lora": str(models / "adapter")}
    runs |= {f"adapted {name}": {**runs[name], **adapter} for name in ("llama", "llama-packed")}
    for name, other in (("llama-packed", "other-packed"), ("mixtral-packed", "mixtral-packed")):
        runs[name] = {**runs[name], "reload": str(models / other)}
    results = generate(*({**EAGER, **run} for run in runs.values()))
    return dict(zip(runs, results, strict=True))


def assert_same(got: Any, expected: Any) -> None:
    assert any(len(set(tokens)) > 3 for tokens in expected["tokens"]), "the model says the same all the time"
    assert got["tokens"] == expected["tokens"]
    assert got["logprobs"] == expected["logprobs"]


def assert_compressed(result: Any, but: str = "-") -> None:
    for parameters in result["parameters"]:
        kinds = {name: kind for name, (kind, nbytes) in parameters.items() if nbytes > SMALL and but not in name}
        assert kinds
        assert set(kinds.values()) == {"torch.uint8"}, kinds


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gemma", "other"])
def test_compressed_directory(single: dict[str, Any], name: str) -> None:
    assert_same(single[f"{name}-packed"], single[name])
    assert_compressed(single[f"{name}-packed"])


@pytest.mark.parametrize("name", ["qwen3-packed", "gemma-packed", "twice-packed", "loading"])
def test_tied_head_is_held_once(single: dict[str, Any], name: str) -> None:
    (parameters,) = single[name]["parameters"]
    assert any("embed_tokens.sign_mantissa__weight" in name for name in parameters)
    assert not any("lm_head" in name for name in parameters)


def test_head_that_the_config_ties_but_the_files_hold(single: dict[str, Any]) -> None:
    (parameters,) = single["other-packed"]["parameters"]
    assert any("lm_head.sign_mantissa__weight" in name for name in parameters)
    assert_same(single["twice-packed"], single["qwen3"])


def test_head_that_nothing_holds(single: dict[str, Any]) -> None:
    assert "MissingTensorError: lm_head: expected the checkpoint to hold its weights" in single["headless"]["error"]


def test_adapter(single: dict[str, Any]) -> None:
    plain, packed = single["adapted llama"], single["adapted llama-packed"]
    assert_same(packed, plain)
    assert packed["tokens"] != packed["base"]["tokens"]
    assert_same(packed["base"], plain["base"])
    assert_compressed(packed, "lora")


def test_other_weights_into_a_running_engine(single: dict[str, Any]) -> None:
    result = single["llama-packed"]
    assert_same(result["reloaded"], single["other"])
    assert result["parameters after"] != result["parameters"]
    (refused,) = result["refused"]
    assert "load others with the engine's reload_weights" in refused


def test_experts_into_a_running_engine(single: dict[str, Any]) -> None:
    assert_same(single["mixtral-packed"]["reloaded"], single["mixtral"])


def test_plain_checkpoint_is_compressed_while_it_loads(single: dict[str, Any]) -> None:
    assert_same(single["loading"], single["qwen3"])
    assert (
        single["loading"]["parameters"] == single["twice-packed"]["parameters"] == single["qwen3-packed"]["parameters"]
    )


def test_fused_mode(single: dict[str, Any]) -> None:
    # The first steps only: later ones may follow another token.
    for steps, expected in zip(single["fused"]["logprobs"], single["llama"]["logprobs"], strict=True):
        first = {token: expected[0].get(token) for token in steps[0]}
        assert steps[0] == pytest.approx(first, abs=0.1)
    # 2 layers, each of 4 matrices, and a head, for each step.
    assert single["fused"]["fused"] >= 9 * 12
    assert single["llama-packed"]["fused"] == 0
    assert_compressed(single["fused"])


@pytest.mark.timeout(600)
def test_tensor_parallel(models: Path, generate: Any) -> None:
    both = {**EAGER, "tensor_parallel_size": 2}
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    (expected,) = generate({**both, "model": str(models / "mixtral")}, **threads)
    (got,) = generate({**both, "model": str(models / "mixtral-packed")}, **threads)
    assert_same(got, expected)
    assert_compressed(got)


@pytest.mark.timeout(600)
def test_pipeline_parallel(single: dict[str, Any], models: Path, generate: Any) -> None:
    # Without compilation the CPU build leaves out a pass that makes buffers of the second process.
    compiled = {"compilation_config": {"mode": 2, "backend": "eager"}}
    packed = {"model": str(models / "gemma-packed"), "pipeline_parallel_size": 2}
    (got,) = generate({**packed, **compiled}, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert_same(got, single["gemma"])
    assert_compressed(got)
    first, last = got["parameters"]
    assert any("layers.0." in name for name in first)
    assert not any("layers.1." in name for name in first)
    assert any("layers.1." in name for name in last)


@pytest.mark.timeout(600)
def test_compiled(models: Path, generate: Any, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    packed = {"model": str(models / "qwen3-packed")}
    got, expected = generate(packed, {"model": str(models / "qwen3")}, VLLM_CACHE_ROOT=cache)
    assert_same(got, expected)
    # vLLM keeps what it compiled. The mode is chosen while it runs, as is how a weight is to be read.
    (fused,) = generate(packed, VLLM_CACHE_ROOT=cache, BITFORBIT_VLLM_MODE="fused")
    assert fused["fused"] >= 9 * 12
