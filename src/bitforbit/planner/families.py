"""Matrices of a model from its config.json alone, for the families whose layers are known here.

Checked against the models that transformers makes of such configs: the numbers of parameters are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitforbit.errors import PlanError
from bitforbit.planner.shapes import Dimensions, Layer, Matrix, Shape, number, optional, text_config

Config = Mapping[str, Any]

_TIED = ("gemma", "gemma2", "gemma3", "gemma3_text")
"""Families whose embedding is the head unless the config says otherwise."""
_FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text")
_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text")
_GATED = ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", *_FOUR_NORMS)
_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
_PLAIN = ("phi", "gpt_neox")
_WINDOWED = ("mistral", "ministral", "gemma2", "gemma3", "gemma3_text")
"""Families that have a window unless the config says null: of 4096 tokens unless it says how many."""
FAMILIES = (*_GATED, "phi3", *_EXPERTS, *_PLAIN)
"""Values of ``model_type`` that :func:`from_config` knows."""


def from_config(config: Config) -> Shape:
    """The model of a config.json. Raises PlanError, for unknown families too."""
    config, whole = text_config(config), config
    family = config.get("model_type") or whole.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise PlanError(
            f"model_type: expected one of {', '.join(FAMILIES)}, got {family!r}; give a directory with the model's "
            "safetensors files, whose headers say what it consists of"
        )
    d = Dimensions.from_config(_with_head_dim(config, family))
    tied = config.get("tie_word_embeddings")
    tied = family in _TIED if tied is None else bool(tied)
    embedding = Matrix("embedding", d.vocab, d.hidden)
    head = None if tied else Matrix("head", d.vocab, d.hidden)
    layer = _plain_layer if family in _PLAIN else _gated_layer
    layers = tuple(layer(config, family, d, i) for i in range(d.layers))
    vectors = d.hidden * (2 if family in _PLAIN else 1)
    if family == "phi" and head is not None:
        vectors += d.vocab
    notes = ("the text model only: config.json does not say what lies beside it",) if config is not whole else ()
    return Shape(family, d, embedding, layers, head, vectors, notes=notes)


def known(config: Config) -> bool:
    """Whether the family of a config.json is one of :data:`FAMILIES`."""
    return (text_config(config).get("model_type") or config.get("model_type")) in FAMILIES


def window(config: Config, index: int) -> int | None:
    """Tokens that a layer's attention sees; None: all, also where an unknown family does not say which layers."""
    family = config.get("model_type")
    if "sliding_window" not in config and family in _WINDOWED:
        size: int | None = 4096
    else:
        size = optional(config, "sliding_window") if config.get("sliding_window") else None
    if size is None or config.get("use_sliding_window", True) is False:
        return None
    types = config.get("layer_types")
    if types:
        if not isinstance(types, list) or len(types) <= index:
            raise PlanError(f"config.json: layer_types: expected one per layer, got {types!r:.40}")
        return size if "sliding" in str(types[index]) else None
    if family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        if not config.get("use_sliding_window") or index < (optional(config, "max_window_layers") or 28):
            return None
        return size
    if family == "gemma2":
        return size if index % 2 == 0 else None
    if family in ("gemma3", "gemma3_text"):
        return size if (index + 1) % (optional(config, "sliding_window_pattern") or 6) else None
    return size if family in FAMILIES else None


def _with_head_dim(config: Config, family: str) -> Config:
    if config.get("head_dim"):
        return config
    usual = {"gemma": 256, "gemma2": 256, "gemma3": 256, "gemma3_text": 256, "qwen3": 128}
    return {**config, "head_dim": usual[family]} if family in usual else config


def _gated_layer(config: Config, family: str, d: Dimensions, index: int) -> Layer:
    """Attention, then gate, up and down; or experts."""
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    vectors = d.hidden * (4 if family in _FOUR_NORMS else 2)
    if family == "phi3":
        attention = [Matrix("qkv", q + 2 * kv, d.hidden, heads=True), Matrix("o", d.hidden, q)]
    else:
        attention = [
            Matrix("q", q, d.hidden),
            Matrix("k", kv, d.hidden, heads=True),
            Matrix("v", kv, d.hidden, heads=True),
            Matrix("o", d.hidden, q),
        ]
    if family in ("qwen2", "qwen2_moe"):
        vectors += q + 2 * kv if config.get("qkv_bias", True) else 0
    elif config.get("attention_bias") and family != "phi3":
        vectors += q + 2 * kv + d.hidden
    if family in _HEAD_NORMS:
        vectors += 2 * d.head_dim
    if family in _EXPERTS and _sparse(config, family, index):
        return Layer((*attention, *_experts(config, family, d)), vectors, window(config, index))
    inner = number(config, "intermediate_size")
    if config.get("mlp_bias"):
        vectors += 2 * inner + d.hidden
    up = [Matrix("mlp.gate", inner, d.hidden), Matrix("mlp.up", inner, d.hidden)]
    if family == "phi3":
        up = [Matrix("mlp.gate_up", 2 * inner, d.hidden)]
    return Layer((*attention, *up, Matrix("mlp.down", d.hidden, inner)), vectors, window(config, index))


def _sparse(config: Config, family: str, index: int) -> bool:
    if family == "mixtral":
        return True
    step = optional(config, "decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple):
        raise PlanError(f"config.json: mlp_only_layers: expected a list, got {dense!r:.40}")
    return index not in dense and (index + 1) % step == 0


def _experts(config: Config, family: str, d: Dimensions) -> list[Matrix]:
    """A router, and two stacks of matrices: gate and up in one, as transformers keeps them."""
    count = number(config, "num_local_experts" if family == "mixtral" else "num_experts")
    chosen = number(config, "num_experts_per_tok")
    if chosen > count:
        raise PlanError(f"config.json: expected num_experts_per_tok within {count} experts, got {chosen}")
    inner = number(config, "intermediate_size" if family == "mixtral" else "moe_intermediate_size")
    used = chosen / count
    stacks = [
        Matrix("router", count, d.hidden),
        Matrix("mlp.gate_up", 2 * inner, d.hidden, count, used),
        Matrix("mlp.down", d.hidden, inner, count, used),
    ]
    if family == "qwen2_moe":
        shared = number(config, "shared_expert_intermediate_size")
        stacks += [
            Matrix("mlp.shared_gate", shared, d.hidden),
            Matrix("mlp.shared_up", shared, d.hidden),
            Matrix("mlp.shared_down", d.hidden, shared),
            Matrix("shared_router", 1, d.hidden),
        ]
    return stacks


def _plain_layer(config: Config, family: str, d: Dimensions, index: int) -> Layer:
    """Attention with biases, and an MLP of two matrices, as in GPT-NeoX and Phi-1 and 2."""
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    inner = number(config, "intermediate_size")
    mlp = [Matrix("mlp.up", inner, d.hidden), Matrix("mlp.down", d.hidden, inner)]
    vectors = inner + d.hidden
    if family == "phi":
        attention = [
            Matrix("q", q, d.hidden),
            Matrix("k", kv, d.hidden, heads=True),
            Matrix("v", kv, d.hidden, heads=True),
            Matrix("o", d.hidden, q),
        ]
        vectors += q + 2 * kv + d.hidden + 2 * d.hidden
        if config.get("qk_layernorm"):
            vectors += 4 * d.head_dim
    else:
        attention = [Matrix("qkv", q + 2 * kv, d.hidden, heads=True), Matrix("o", d.hidden, q)]
        vectors += 4 * d.hidden + (q + 2 * kv + d.hidden if config.get("attention_bias", True) else 0)
    return Layer((*attention, *mlp), vectors, window(config, index))
