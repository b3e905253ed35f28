"""The models that test_tensor_parallel.py splits, as plain and compressed directories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as tf
from transformers.distributed.tensor_parallel import TensorParallelLayer

import bitforbit
from integrations import zoo
from integrations.test_refusals import flip

OLD = not hasattr(TensorParallelLayer, "_from_local_last_dim_shard")
"""Whether transformers is one of the older releases, which split less."""

TEXT: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _llama(**kwargs: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, **kwargs}))


def _gpt_oss() -> Any:
    config = tf.GptOssConfig(**TEXT, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    return tf.GptOssForCausalLM(config)


def _qwen3_moe() -> Any:
    moe = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **moe, mlp_only_layers=[1]))


def _deepseek() -> Any:
    mla = {
        "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    }  # fmt: skip
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**{**TEXT, "num_key_value_heads": 4}, **mla))


MODELS: dict[str, Callable[[], Any]] = {
    **{name: zoo.MODELS[name] for name in ("llama", "llama-tied", "qwen3", "gemma3", "mixtral")},
    "llama-bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-uneven": lambda: _llama(vocab_size=255, intermediate_size=191),
    "llama-one-head": lambda: _llama(num_key_value_heads=1),
    "qwen3-moe": _qwen3_moe,
    "gpt-oss": _gpt_oss,
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT, rope_scaling=None)),
    "deepseek": _deepseek,
    "large": lambda: _llama(hidden_size=1024, intermediate_size=4096, vocab_size=16384),
}
DENSE = ("llama", "llama-tied", "qwen3", "gemma3", "llama-bias", "phi3", *(() if OLD else ("llama-uneven",)))
EXPERTS = ("mixtral", "qwen3-moe", "gpt-oss", "deepseek")


def write_models(folder: Path, rank: int) -> None:
    """Plain and compressed directories of every second model."""
    for name in list(MODELS)[rank::2]:
        zoo.MODELS[name] = MODELS[name]
        zoo.write(name, folder / name / "plain")
        bitforbit.compress(folder / name / "plain", folder / name / "native", threads=1)


def write_damaged(folder: Path) -> None:
    """The model again: each time with one tensor damaged, and as one that claims to be a DFloat11 model."""
    for tensor in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        copy = folder / "damaged" / tensor
        shutil.copytree(folder / "llama" / "native", copy)
        module, _, parameter = tensor.rpartition(".")
        flip(copy / "model.safetensors", f"{module}.sign_mantissa__{parameter}")
    path = Path(shutil.copytree(folder / "llama" / "native", folder / "df11")) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dfloat11_config": {"version": "0.5.0"}}))
