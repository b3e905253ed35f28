"""Which layers of a model are quantized, and with what: a pure function of its config and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import DynamicCache

from bitforbit.errors import KvCacheError, KvSpecError
from bitforbit.kv.spec import VALUE_GROUPS, KiviSpec


def decoder_config(config: Any) -> Any:
    """The part of a config that says how text is generated. Raises KvCacheError for models without such a cache."""
    name = type(config).__name__
    if not hasattr(config, "get_text_config"):
        raise KvCacheError(f"expected a model's config, got {name}; pass model.config")
    if getattr(config, "is_encoder_decoder", False):
        raise KvCacheError(
            f"expected a model that only decodes, got an encoder-decoder one ({name}); use its own cache, which "
            "generate() makes when no past_key_values are passed"
        )
    decoder = config.get_text_config(decoder=True)
    for field in ("num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(_read(decoder, 0, field), int):
            raise KvCacheError(
                f"expected a config of a model that writes text by attention, got {name} without {field}"
            )
    if _read(decoder, 0, "kv_lora_rank") is not None:
        raise KvCacheError(
            f"expected keys and values of one head dimension, got multi-head latent attention ({name}); use the "
            "model's own cache"
        )
    return decoder


def _read(decoder: Any, index: int, field: str) -> Any:
    """A field of a layer; None if there is none."""
    layers = getattr(decoder, "per_layer_config", None)  # where layers differ, only this may be asked
    return getattr(layers[index] if layers else decoder, field, None)


def head_dim(decoder: Any, index: int) -> int | None:
    """Head dimension of a layer, if the config says."""
    value = _read(decoder, index, "head_dim")
    hidden, heads = _read(decoder, index, "hidden_size"), _read(decoder, index, "num_attention_heads")
    if value is None and isinstance(hidden, int) and isinstance(heads, int):
        value = hidden // heads
    return value if isinstance(value, int) else None


def own_layers(decoder: Any) -> list[Any]:
    """The layers that transformers' own cache of the model has."""
    return list(DynamicCache(config=decoder).layers)


def quantizable(decoder: Any, layers: list[Any]) -> list[int]:
    """Indices of the full-attention layers whose keys and values no other layer reads."""
    shared = _shared(decoder)
    # By exact class: what derives from it keeps more than keys and values.
    return [i for i, layer in enumerate(layers) if type(layer).__name__ == "DynamicLayer" and i not in shared]


def _shared(decoder: Any) -> set[int]:
    """Layers whose keys and values later layers use instead of their own (Gemma 3n and 4)."""
    modes = getattr(decoder, "kv_sharing_modes", None)
    if modes is not None:
        return {i for i, mode in enumerate(modes) if mode is not None}
    count = getattr(decoder, "num_kv_shared_layers", None) or 0
    if not isinstance(count, int) or count == 0:
        return set()
    # The last layer of each type before those that share.
    types = decoder.layer_types[: decoder.num_hidden_layers - count]
    return {len(types) - 1 - types[::-1].index(kind) for kind in set(types)}


def specs(
    decoder: Any, layers: list[Any], common: KiviSpec, exceptions: Mapping[int, KiviSpec | None]
) -> dict[int, KiviSpec]:
    """The settings of each quantized layer. Raises KvCacheError if there is none, or an exception fits no layer."""
    can = quantizable(decoder, layers)
    for index, spec in exceptions.items():
        if not isinstance(index, int) or not 0 <= index < len(layers):
            raise KvCacheError(f"layers: expected indices of 0 to {len(layers) - 1}, got {index!r}")
        if spec is not None and index not in can:
            raise KvCacheError(
                f"layers: expected a layer with full attention of its own, got {index}, {type(layers[index]).__name__}"
            )
    chosen = {i: exceptions.get(i, common) for i in can}
    found = {i: spec for i, spec in chosen.items() if spec is not None}
    if not found:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise KvCacheError(
            f"expected a model with full-attention layers to quantize, got none among {len(layers)} layers "
            f"({', '.join(kinds)}); windowed and linear layers are small and stay as they are: use the model's cache"
        )
    return found


def fitted(spec: KiviSpec, head_dim: int) -> KiviSpec:
    """The settings for a head dimension: unless told, values are in the largest groups up to ``group`` that divide it.

    Raises KvSpecError if none does.
    """
    if spec.v_group is None and head_dim % spec.value_group:
        fitting = [group for group in VALUE_GROUPS if group <= spec.group and head_dim % group == 0]
        if not fitting:
            raise KvSpecError(f"expected a head dimension that is a multiple of 16 up to 512, got {head_dim}")
        spec = replace(spec, v_group=fitting[-1])
    spec.check_head(head_dim)
    return spec
