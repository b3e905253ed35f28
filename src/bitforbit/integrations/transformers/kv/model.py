"""A model and a quantized cache that fit each other."""

from __future__ import annotations

from typing import Any

from bitforbit.errors import KvCacheError
from bitforbit.integrations.transformers.kv.attention import NAME, READERS
from bitforbit.integrations.transformers.kv.cache import KiviCache


def kivi_cache(model: Any, **settings: Any) -> KiviCache:
    """A quantized cache for a model, whose attention is set to ``bitforbit_kivi``: ``past_key_values`` of generate().

    ``settings`` are those of :class:`KiviCache`. With other caches the model then computes as with ``sdpa`` attention
    (``model.set_attn_implementation`` changes it back). Raises KvCacheError or KvSpecError.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise KvCacheError(f"expected a model of transformers, got {name}")
    cache = KiviCache(config, **settings)
    if not model.can_generate():
        raise KvCacheError(f"expected a model that generates text, got {name}; load it with AutoModelForCausalLM")
    set_attention(model)
    return cache


def attention(model: Any) -> str:
    """Name of the attention of the part of a model that writes text."""
    name: str = model.config.get_text_config(decoder=True)._attn_implementation
    return name


def set_attention(model: Any, name: str = NAME) -> None:
    """Set the attention of the part of a model that writes text; the others (vision, audio) keep theirs.

    Raises KvCacheError if the model's class does not allow it.
    """
    if attention(model) == name or (name == NAME and attention(model) in READERS):
        return
    config = model.config
    text = config.get_text_config(decoder=True)
    model.set_attn_implementation(name if text is config else dict.fromkeys(_paths(config, text), name))
    if attention(model) != name:
        raise KvCacheError(
            f"expected a model whose attention can be set, got {type(model).__name__}, which does not go through "
            "transformers' AttentionInterface; use the model's own cache"
        )


def _paths(config: Any, text: Any) -> list[str]:
    return [key for key in config.sub_configs if getattr(config, key, None) is text]
