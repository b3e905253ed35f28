"""Tiny random models for tests of quantized caches."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EAGER = {key: {"attn_implementation": "eager"} for key in ("gemma2", "gpt_oss")}  # sdpa leaves caps and sinks out
_MIXED = ["sliding_attention", "full_attention"]


def _config(name: str) -> Any:
    match name:
        case "qwen3":
            return tf.Qwen3Config(**_COMMON)
        case "mistral":
            return tf.MistralConfig(**_COMMON, sliding_window=None)
        case "gemma2":
            return tf.Gemma2Config(
                **_COMMON, sliding_window=16, layer_types=_MIXED, query_pre_attn_scalar=24,
                attn_logit_softcapping=2.0, final_logit_softcapping=None,
            )  # fmt: skip
        case "gemma3":
            return tf.Gemma3TextConfig(**_COMMON, sliding_window=16, layer_types=_MIXED, query_pre_attn_scalar=24)
        case "gpt_oss":
            return tf.GptOssConfig(
                **_COMMON, sliding_window=16, layer_types=_MIXED, num_local_experts=2, num_experts_per_tok=1
            )
        case "gpt2":
            return tf.GPT2Config(
                vocab_size=VOCABULARY, n_positions=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
            )
        case "phi3":  # qkv in one matrix
            return tf.Phi3Config(**{k: v for k, v in _COMMON.items() if k != "head_dim"}, sliding_window=None)
        case "mha":
            return tf.LlamaConfig(**{**_COMMON, "num_key_value_heads": 4})
        case "mqa":
            return tf.LlamaConfig(**{**_COMMON, "num_key_value_heads": 1})
    return tf.LlamaConfig(**_COMMON)


ARCHITECTURES = ("llama", "mha", "mqa", "qwen3", "mistral", "phi3", "gpt2", "gemma2", "gemma3", "gpt_oss")


def make(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights, large enough that attention matters."""
    config = _config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype, **_EAGER.get(name, {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = None  # of random tokens any may come
    model.generation_config.pad_token_id = 0
    return model


def prompts(rows: int, tokens: int, padding: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Random prompts, the first rows with so much padding on the left."""
    generator = torch.Generator().manual_seed(rows * 1000 + tokens)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count] = 0
        mask[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask}
