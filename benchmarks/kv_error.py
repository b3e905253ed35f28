"""Error of one step's attention over quantized caches, layer by layer, and what settings change about it.

The keys, values and queries are those of a model on text. Exact: attention in FP64 over the 16-bit keys and values.
Error: norm of the difference from it by its norm, all rows and heads of a layer together. Part of kv_quality.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from bitforbit.attention.quantized import attend
from bitforbit.kv.naive import attention
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState

BITS = ((8, 8), (4, 4), (4, 2), (2, 2))
SETTINGS = ((32, 128, 0), (64, 128, 0), (128, 128, 0), (32, 32, 0), (32, 128, 1), (32, 128, 4))
"""Group, window, sinks: one thing changed at a time."""

Captured = list[tuple[Tensor, Tensor, Tensor, float]]
_captured: Captured = []


def _capture(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    _captured.append((query.clone(), key.clone(), value.clone(), options["scaling"]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


@torch.inference_mode()
def capture(model: Any, given: DynamicCache, token: Tensor, rows: int) -> Captured:
    """Queries [B, Hq, 1, D], keys and values [B, H, T, D], scaling of each layer for a step after a prefix."""
    AttentionInterface.register("kv_error_capture", _capture)
    AttentionMaskInterface.register("kv_error_capture", sdpa_mask)
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(given.layers):
        cache.update(layer.keys[:rows].clone(), layer.values[:rows].clone(), index)
    before = model.config._attn_implementation
    model.set_attn_implementation("kv_error_capture")
    try:
        model.model(token[:rows, None], past_key_values=cache, use_cache=True)
        return list(_captured)
    finally:
        _captured.clear()
        model.set_attn_implementation(before)


def exact(captured: Captured) -> list[Tensor]:
    """Attention in FP64 of each layer, [B, Hq, 1, D]."""
    done = []
    for query, keys, values, scaling in captured:
        groups = query.shape[1] // keys.shape[1]
        wide = [x.double().repeat_interleave(groups, 1) for x in (keys, values)]
        rows = zip(query.double(), *wide, strict=True)
        done.append(torch.stack([attention(q, k, v, None, scaling, None, None) for q, k, v in rows]))
    return done


@torch.inference_mode()
def errors(captured: Captured, right: Sequence[Tensor], spec: KiviSpec) -> list[float]:
    """Relative error of each layer: all tokens but the last are given at once, and the last is a step."""
    found = []
    for (query, keys, values, scaling), wanted in zip(captured, right, strict=True):
        batch, heads, _, head_dim = keys.shape
        state = KvState(spec, batch, heads, head_dim, dtype=keys.dtype, device=keys.device)
        state.append(keys[:, :, :-1], values[:, :, :-1])
        state.flush()
        state.append(keys[:, :, -1:], values[:, :, -1:])
        out = attend(query, state, None, scaling=scaling)
        found.append(float((out.double() - wanted).norm() / wanted.norm()))
    return found


def sensitivity(model: Any, given: DynamicCache, token: Tensor, rows: int = 2) -> list[dict[str, Any]]:
    """Errors for all settings; the first line is plain attention on the 16-bit cache."""
    captured = capture(model, given, token, rows)
    right, head_dim = exact(captured), captured[0][1].shape[-1]
    plain = []
    for (query, keys, values, scaling), wanted in zip(captured, right, strict=True):
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
        plain.append(float((out.double() - wanted).norm() / wanted.norm()))
    lines = [{"bits": "16", **summary(plain)}]
    for k_bits, v_bits in BITS:
        for group, residual, sink in SETTINGS:
            spec = KiviSpec(k_bits, v_bits, group, min(group, head_dim), residual, sink)
            name = str(k_bits) if k_bits == v_bits else f"K{k_bits}V{v_bits}"
            found = summary(errors(captured, right, spec))
            bits = (spec.key_bits_per_element + spec.value_bits_per_element) / 2
            lines.append(
                {"bits": name, "group": group, "residual": residual, "sink": sink, "per_element": bits, **found}
            )
    return lines


def summary(layers: list[float]) -> dict[str, Any]:
    """Median, worst layer, all."""
    worst = max(range(len(layers)), key=layers.__getitem__)
    return {"median": statistics.median(layers), "worst": layers[worst], "worst_layer": worst, "layers": layers}
