"""The attention ``bitforbit_kivi`` of transformers' ``AttentionInterface``: reads quantized layers as they are.

The first call of a cache attends to its own tensors as transformers' ``sdpa`` does; later ones go to
:mod:`bitforbit.attention.quantized`. Then the cache quantizes what has left its window, as the published code does.
Layers that are not quantized, and calls without a cache, are computed by ``sdpa``, or, with what that lacks (a cap of
the logits, as in Gemma 2, or attention sinks, as in gpt-oss), by :func:`bitforbit.attention.online.attend_exact`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from bitforbit.attention.online import attend_exact
from bitforbit.attention.quantized import attend
from bitforbit.errors import KvCacheError
from bitforbit.integrations.transformers.kv.handle import KvHandle

NAME = "bitforbit_kivi"
READERS = {NAME}
"""Attentions that take what a quantized layer hands out."""

_UNKNOWN = ("position_bias", "indices", "block_indices", "sinks")
"""What attention functions of some models are given, and a quantized layer cannot do."""


def register() -> None:
    """Make transformers know the attention, and that its masks are those of ``sdpa``: else padding would be seen."""
    AttentionInterface.register(NAME, kivi_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _tokens(mask: torch.Tensor, slots: int) -> torch.Tensor:
    """Which slots are tokens, ``[B, 1, 1, slots]``: what the last query sees, and what sees itself, as no padding does.

    The last query alone would not do: a mask of one's own may hide a whole document from it.
    """
    seen = mask[:, :1, :, :slots]
    if seen.dtype is not torch.bool:
        seen = seen > torch.finfo(seen.dtype).min / 2
    queries = seen.shape[2]
    if queries == 1:
        return seen
    itself = seen.diagonal(slots - queries, dim1=2, dim2=3)
    before = seen[:, :, -1, : slots - queries]
    return torch.cat([before, seen[:, :, -1, slots - queries :] | itself], -1)[:, :, None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _from_cache(
    module: Any,
    query: torch.Tensor,
    handle: KvHandle,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    layer = handle.handle_layer
    keys, values = handle.handle_keys, handle.handle_values
    if handle.handle_done or keys is None or values is None:
        raise KvCacheError(
            f"layer {layer.index}: expected its keys and values to be attended once, got a second time: this model "
            f"shares them among layers; keep this one exact with layers={{{layer.index}: None}}"
        )
    state = layer.state
    assert state is not None  # it was made before the handle
    if not layer.padding_is_known:
        if mask is not None:
            state.set_padding(_tokens(mask, state.slots))
        # A prompt in chunks may begin with nothing but padding.
        layer.padding_is_known = mask is None or max(state.starts) < state.slots
    if handle.handle_first:
        out = _exact(module, query, keys, values, mask, scaling, softcap, sinks, options)
    elif layer.spec.residual is None:
        state.flush()
        out = _exact(module, query, state.exact_keys(), state.exact_values(), mask, scaling, softcap, sinks, options)
    else:
        out = attend(query, state, mask, scaling=scaling, softcap=softcap, sinks=sinks).transpose(1, 2).contiguous()
    layer.attended()
    return out


def kivi_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | KvHandle,
    value: torch.Tensor | KvHandle,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query`` [B, Hq, q, D] to a layer's keys and values; the result is [B, q, Hq, D].

    ``attention_mask``: bool or to be added, [B, 1 or Hq, q, T], None: causal. Raises KvCacheError.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if not isinstance(key, KvHandle) and not isinstance(value, KvHandle):
        options = {**kwargs, "dropout": dropout}
        return _exact(module, query, key, value, attention_mask, scaling, softcap, s_aux, options), None
    if key is not value or not isinstance(key, KvHandle):
        raise KvCacheError("expected the keys and values that one layer of the cache returned, got those of two")
    if dropout:
        raise KvCacheError(f"a quantized cache is for inference, expected no dropout, got {dropout}; call model.eval()")
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise KvCacheError(
            f"layer {key.handle_layer.index}: expected attention without {', '.join(unknown)}, which a quantized layer "
            "cannot do; use the model's own cache"
        )
    return _from_cache(module, query, key, attention_mask, scaling, softcap, s_aux, kwargs), None


def _exact(
    module: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention to tensors: [B, q, Hq, D]."""
    if softcap is None and sinks is None:
        out: torch.Tensor = sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling, **options)[0]
        return out
    if options.get("dropout") or query.requires_grad or keys.requires_grad:
        raise KvCacheError(
            "expected no training with this attention where logits are capped or sinks are used; "
            'model.set_attn_implementation("eager") before, and bitforbit.kivi_cache(model) after it'
        )
    is_causal = options.get("is_causal")
    causal = mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    heads, _ = attend_exact(query, keys, values, mask, causal=causal, scaling=scaling, softcap=softcap, sinks=sinks)
    return heads.transpose(1, 2).contiguous()
