"""Configs of published models: the fields that count, as their config.json has them."""

from __future__ import annotations

from typing import Any


def _config(
    family: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        **more,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _config("llama", 4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072),
    "llama-3.3-70b": _config("llama", 8192, 28672, 80, 64, 8, 128256, max_position_embeddings=131072),
    "llama-3.1-405b": _config("llama", 16384, 53248, 126, 128, 8, 128256, max_position_embeddings=131072),
    "llama-2-7b": _config("llama", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096, torch_dtype="float16"),
    "qwen3-8b": _config("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128, max_position_embeddings=131072),
    "qwen3-14b": _config("qwen3", 5120, 17408, 40, 40, 8, 151936, head_dim=128),
    "qwq-32b": _config("qwen2", 5120, 27648, 64, 40, 8, 152064, use_sliding_window=False, sliding_window=32768),
    "mistral-nemo": _config(
        "mistral", 5120, 14336, 40, 32, 8, 131072, head_dim=128, max_position_embeddings=131072, sliding_window=None
    ),
    "mistral-small-3": _config(
        "mistral", 5120, 32768, 40, 32, 8, 131072, head_dim=128, max_position_embeddings=32768, sliding_window=None
    ),
    "phi-4": _config("phi3", 5120, 17920, 40, 40, 10, 100352, max_position_embeddings=32768),
}
