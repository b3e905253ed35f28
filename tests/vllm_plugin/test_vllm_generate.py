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
    runs = {name: {"model": str(models / name)} for name in ("llama", "qwen3", "mixtral")}
    runs |= {f"{name}-packed": {"model": str(models / f"{name}-packed")} for name in list(runs)}
    runs["loading"] = {"model": str(models / "llama"), "quantization": "bitforbit"}
    runs["fused"] = {**runs["llama-packed"], "environment": {"BITFORBIT_VLLM_MODE": "fused"}}
    results = generate(*({**EAGER, **run} for run in runs.values()))
    return dict(zip(runs, results, strict=True))


def assert_same(got: Any, expected: Any) -> None:
    assert all(len(set(tokens)) > 3 for tokens in expected["tokens"]), "the model says the same all the time"
    assert got["tokens"] == expected["tokens"]
    assert got["logprobs"] == expected["logprobs"]


def assert_compressed(result: Any, but: str = "-") -> None:
    for parameters in result["parameters"]:
        kinds = {name: kind for name, (kind, nbytes) in parameters.items() if nbytes > SMALL and but not in name}
        assert kinds
        assert set(kinds.values()) == {"torch.uint8"}, kinds


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_compressed_directory(single: dict[str, Any], name: str) -> None:
    assert_same(single[f"{name}-packed"], single[name])
    # vLLM asks no quantization method about the embeddings of Mixtral.
    assert_compressed(single[f"{name}-packed"], "embed_tokens" if name == "mixtral" else "-")


def test_tied_head_is_held_once(single: dict[str, Any]) -> None:
    (parameters,) = single["qwen3-packed"]["parameters"]
    assert any("embed_tokens.sign_mantissa__weight" in name for name in parameters)
    assert not any("lm_head" in name for name in parameters)


def test_plain_checkpoint_is_compressed_while_it_loads(single: dict[str, Any]) -> None:
    assert_same(single["loading"], single["llama"])
    assert single["loading"]["parameters"] == single["llama-packed"]["parameters"]


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
    (expected,) = generate({**both, "model": str(models / "llama")}, **threads)
    (got,) = generate({**both, "model": str(models / "llama-packed")}, **threads)
    assert_same(got, expected)
    assert_compressed(got)


@pytest.mark.timeout(600)
def test_compiled(models: Path, generate: Any, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    packed = {"model": str(models / "qwen3-packed")}
    got, expected = generate(packed, {"model": str(models / "qwen3")}, VLLM_CACHE_ROOT=cache)
    assert_same(got, expected)
    # vLLM keeps what it compiled. The mode is chosen while it runs, as is how a weight is to be read.
    (fused,) = generate(packed, VLLM_CACHE_ROOT=cache, BITFORBIT_VLLM_MODE="fused")
    assert fused["fused"] >= 9 * 12
