"""Bytes per generated token."""

from __future__ import annotations

import pytest

from bitforbit.errors import IoModelError
from bitforbit.iomodel import Level, Machine, ModelShape, bytes_by_level, find_machine, predict_seconds, step_traffic

LLAMA_8B = ModelShape(
    layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256
)  # fmt: skip


def test_llama() -> None:
    """8,030,261,248 parameters, less the embedding (128256 x 4096) and the norms (65 x 4096)."""
    assert LLAMA_8B.weights_per_step() == 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert LLAMA_8B.kv_elements_per_token == 65536
    traffic = step_traffic(LLAMA_8B, 1000, batch=3)
    assert traffic.weights == 2 * LLAMA_8B.weights_per_step()
    assert traffic.kv_read == 3 * 1000 * 2 * 65536
    assert traffic.kv_written == 3 * 2 * 65536
    assert traffic.total == traffic.weights + traffic.kv_read + traffic.kv_written + traffic.activations


def test_bits() -> None:
    full = step_traffic(LLAMA_8B, 10_000)
    packed = step_traffic(LLAMA_8B, 10_000, bits_per_weight=10.8, k_bits=5.0, v_bits=3.0, exact_tokens=100)
    assert packed.weights == pytest.approx(full.weights * 10.8 / 16)
    assert packed.kv_read == pytest.approx(full.kv_read * (9_900 * 8 / 32 + 100) / 10_000)
    assert step_traffic(LLAMA_8B, 50, k_bits=3, v_bits=3, exact_tokens=100).kv_read == 50 * 2 * 65536
    assert step_traffic(LLAMA_8B, 0).kv_read == 0


def test_config() -> None:
    config = {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    assert ModelShape.from_config(config) == LLAMA_8B
    assert ModelShape.from_config(config | {"head_dim": 64}).head_dim == 64
    assert ModelShape.from_config({"text_config": config, "vision_config": {}}) == LLAMA_8B
    with pytest.raises(IoModelError, match="latent attention"):
        ModelShape.from_config(config | {"kv_lora_rank": 512})
    with pytest.raises(IoModelError, match="without 'vocab_size'"):
        ModelShape.from_config({k: v for k, v in config.items() if k != "vocab_size"})
    with pytest.raises(IoModelError, match="hidden: expected a positive number, got 'wide'"):
        ModelShape.from_config(config | {"hidden_size": "wide", "head_dim": 128})
    with pytest.raises(IoModelError, match="kv_heads to divide heads"):
        ModelShape.from_config(config | {"num_key_value_heads": 5})


def test_experts() -> None:
    config = {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4,
        "vocab_size": 100, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    }  # fmt: skip
    shape = ModelShape.from_config(config)
    assert (shape.experts, shape.experts_per_token, shape.intermediate, shape.kv_heads) == (8, 2, 32, 4)
    one, all_ = (2 * used * 3 * 64 * 32 + 2 * 4 * 64 * 64 + 6400 for used in (2, 8))
    assert shape.weights_per_step(1) == pytest.approx(one)
    assert one < shape.weights_per_step(4) < shape.weights_per_step(400) <= all_ + 1


def test_levels() -> None:
    machine = Machine(
        "box", (Level("regs", 10, cache=False), Level("L1", 1000), Level("L2", 10_000), Level("DRAM", 10**9)), "L1"
    )
    small = ModelShape(1, 8, 8, 1, 1, 8, 8)
    traffic = step_traffic(small, 0)  # 1152 bytes and a few hundred of activations
    assert bytes_by_level(traffic, machine) == {
        "DRAM": 0,
        "L2": traffic.total - traffic.activations,
        "L1": traffic.total,
    }
    large = step_traffic(LLAMA_8B, 0)
    assert bytes_by_level(large, machine)["DRAM"] == large.total
    only = Machine("flat", (Level("DRAM", 10**9),), "DRAM")
    assert bytes_by_level(traffic, only) == {"DRAM": traffic.total}


def test_seconds() -> None:
    gpu = find_machine("H100")
    traffic = step_traffic(LLAMA_8B, 131072)
    moved = bytes_by_level(traffic, gpu)
    assert list(moved) == ["HBM", "L2"]
    assert predict_seconds(traffic, gpu) == moved["HBM"] / 3.35e12
    assert predict_seconds(step_traffic(LLAMA_8B, 131072, k_bits=3, v_bits=3), gpu) < predict_seconds(traffic, gpu)
    assert predict_seconds(traffic, find_machine("H200")) < predict_seconds(traffic, gpu)
    with pytest.raises(IoModelError, match="measure it"):
        predict_seconds(traffic, find_machine("CPU"))


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"bits_per_weight": 0}, {"k_bits": -1}, {"exact_tokens": -1}])
def test_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(IoModelError, match="positive bits"):
        step_traffic(LLAMA_8B, 10, **wrong)  # type: ignore[arg-type]
    with pytest.raises(IoModelError, match="context >= 0"):
        step_traffic(LLAMA_8B, -1)
