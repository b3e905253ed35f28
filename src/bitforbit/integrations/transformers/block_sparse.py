"""Block-sparse prefill for models of transformers: ``block_sparse(model, pattern="topk", density=0.25)``.

An attention implementation, "bitforbit_block_sparse", and the mask that goes with it. Full-attention layers read, for
many new tokens at once, the blocks of keys that a pattern keeps; everything else (decoding, short prompts, sliding and
chunked layers, encoders) is scaled_dot_product_attention, as with transformers' "sdpa". It changes what a model
computes, unless the density is 1: opt-in, per model.

Padded batches: each row is computed without its padding, so that a row gets the blocks that it would get alone.
Quantized caches: the first call is block-sparse, and what comes later reads the cache as it is packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from bitforbit.attention import block_sparse as sparse
from bitforbit.attention import patterns
from bitforbit.attention.grid import Grid
from bitforbit.errors import AttentionError
from bitforbit.integrations.transformers.kv.attention import READERS, kivi_attention
from bitforbit.integrations.transformers.kv.handle import KvHandle

NAME = "bitforbit_block_sparse"
WINDOWED = ("sliding_attention", "chunked_attention")
ATTRIBUTE = "_bitforbit_block_sparse"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class BlockSparseSpec:
    """Settings of one layer. Raises AttentionError for settings that do not exist."""

    pattern: str = "topk"
    """One of ``bitforbit.attention.patterns.PATTERNS``."""
    density: float = 0.25
    """Share of the visible blocks to keep."""
    block: int = 128
    """Tokens per block; on GPUs a multiple of 64."""
    dense_below: int = 4096
    """Calls with fewer keys than this are dense, and so are calls with fewer queries than a block."""
    seed: int = 0
    """Of the pattern "random"."""

    def __post_init__(self) -> None:
        if self.pattern not in patterns.PATTERNS:
            raise AttentionError(f"pattern: expected one of {', '.join(patterns.PATTERNS)}, got {self.pattern!r}")
        if not 0 < self.density <= 1:
            raise AttentionError(f"density: expected more than 0 and at most 1, got {self.density!r}")
        if self.block < 16 or self.block & (self.block - 1):
            raise AttentionError(f"block: expected a power of two from 16 tokens on, got {self.block!r}")
        if self.dense_below < 0:
            raise AttentionError(f"dense_below: expected 0 or more tokens, got {self.dense_below!r}")


_DEFAULT = BlockSparseSpec()


def block_sparse(
    model: Model,
    pattern: str = "topk",
    density: float = 0.25,
    block: int = 128,
    dense_below: int = 4096,
    *,
    seed: int = 0,
    layers: dict[int, BlockSparseSpec | None] | None = None,
) -> Model:
    """Let the full-attention layers of a model read a share of the blocks at prefill; returns the model.

    ``layers`` overrides single layers by index; None: dense. ``model.set_attn_implementation("sdpa")`` ends it. Raises
    AttentionError for settings that do not exist, layers that the model lacks, and models whose attention is fixed.
    """
    spec = BlockSparseSpec(pattern, density, block, dense_below, seed)
    overrides = dict(layers or {})
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    unknown = set(overrides) - {module.layer_idx for module in modules}
    if unknown:
        raise AttentionError(f"layers: expected indices of the model's layers, got {sorted(unknown)}")
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise AttentionError(
            f"expected a model whose attention implementation can be set, got {type(model).__name__}, "
            f"which stays with {model.config._attn_implementation!r}"
        )
    for module in modules:
        setattr(module, ATTRIBUTE, overrides.get(module.layer_idx, spec))
    return model


def block_sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | KvHandle,
    value: Tensor | KvHandle,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: ``query`` ``[B, Hq, Lq, D]``; returns ``[B, Lq, Hq, Dv]``.

    ``attention_mask``: what ``block_sparse_mask`` made. Raises AttentionError for scores that are changed (soft caps,
    sinks, biases) and, in a sparse call, for masks other than causal ones with padding at the ends, and dropout.
    """
    # Keys of a static cache beyond those that have been written are cut off with the mask, or by the number of queries.
    kv_tokens = query.shape[2] if attention_mask is None else attention_mask.shape[-1]
    spec = _spec(module, query.shape[2], kv_tokens, kwargs)
    if isinstance(key, KvHandle) or isinstance(value, KvHandle):
        if spec is None or not isinstance(key, KvHandle) or not key.handle_first or key.handle_keys is None:
            mask = _as_matrix(attention_mask, query)
            return kivi_attention(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        _refuse(kwargs, dropout)
        out = _sparse(spec, query, key.handle_keys, key.handle_values, attention_mask, scaling)
        layer = key.handle_layer
        if attention_mask is not None and layer.state is not None:
            layer.state.set_padding(attention_mask[:, None, None, :])
        layer.attended()
        return out, None
    _refuse(kwargs, 0 if spec is None else dropout)
    if spec is None:
        if attention_mask is not None and attention_mask.ndim == 2:
            key, value = key[:, :, :kv_tokens], value[:, :, :kv_tokens]
        mask = _as_matrix(attention_mask, query)
        dense, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        return dense, None
    return _sparse(spec, query, key[:, :, :kv_tokens], value[:, :, :kv_tokens], attention_mask, scaling), None


def _spec(module: nn.Module, queries: int, keys: int, kwargs: dict[str, Any]) -> BlockSparseSpec | None:
    """The settings of a call that is to be block-sparse; None: dense."""
    spec: BlockSparseSpec | None = getattr(module, ATTRIBUTE, _DEFAULT)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if spec is None or not causal or _windowed(module, kwargs):
        return None
    return None if queries < spec.block or keys < spec.dense_below else spec


def _refuse(kwargs: dict[str, Any], dropout: float) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise AttentionError(f"{NAME} has no {name}: use attn_implementation='eager' for this model")
    if dropout:
        raise AttentionError(f"{NAME} has no dropout, got {dropout}: set attention_dropout=0, or train with 'sdpa'")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sparse(
    spec: BlockSparseSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Every row without its padding; ``[B, Lq, Hq, Dv]``."""
    kv_tokens = key.shape[2]
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    for rows, start, end in _ranges(mask, query.shape[0], kv_tokens):
        # The queries are the last ones of kv_tokens: those of the row's own tokens are [first, last) among them.
        first = max(start - (kv_tokens - query.shape[2]), 0)
        last = end - (kv_tokens - query.shape[2])
        if first < last:
            q, k, v = query[rows, :, first:last], key[rows, :, start:end], value[rows, :, start:end]
            grid = Grid(q.shape[2], k.shape[2], spec.block)
            layout = patterns.with_density(spec.pattern, grid, spec.density, q, k, spec.seed)
            out[rows, :, first:last] = sparse.attention(q, k, v, layout, grid, scaling=scaling)
    return out.transpose(1, 2).contiguous()


def _ranges(mask: Tensor | None, batch: int, kv_tokens: int) -> list[tuple[slice | list[int], int, int]]:
    """Rows of the batch that hold tokens at the same places, and the first and the end of those places."""
    if mask is None:
        return [(slice(None), 0, kv_tokens)]
    if mask.ndim != 2:
        raise AttentionError(
            f"{NAME} honours causal masks with padding at the ends, got a mask {tuple(mask.shape)} (packed sequences, "
            "images, a mask of your own): use set_attn_implementation('sdpa'), or dense_below above the prompt's length"
        )
    mask = mask.cpu()
    counts = mask.sum(-1).tolist()
    starts = mask.to(torch.int8).argmax(-1).tolist()
    found: dict[tuple[int, int], list[int]] = {}
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if not bool(mask[row, start : start + count].all()):
            raise AttentionError(f"expected padding at the ends of a row only, got holes in the mask of row {row}")
        found.setdefault((start, start + count), []).append(row)
    whole = len(found) == 1
    return [(slice(None) if whole else rows, start, end) for (start, end), rows in found.items() if end > start]


def _windowed(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a layer has a window of its own."""
    if kwargs.get("sliding_window") is not None:
        return True
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return types is not None and index is not None and index < len(types) and types[index] in WINDOWED


def _as_matrix(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask that transformers' "sdpa" would have been given, bool ``[B, 1, Lq, tokens so far]``."""
    if mask is None or mask.ndim != 2:
        return mask
    q_tokens, kv_tokens = query.shape[2], mask.shape[1]
    causal = torch.ones(q_tokens, kv_tokens, dtype=torch.bool, device=query.device).tril(kv_tokens - q_tokens)
    return causal & mask[:, None, None, :]


def block_sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask as its padding, bool ``[B, tokens so far]``, where it is causal; None: no padding, all tokens are new.

    A matrix of queries and keys would be larger than the rest of a long prefill. Any other mask, and those of single
    tokens, are made as for "sdpa".
    """
    plain = mask_function is causal_mask_function and local_size is None and allow_is_causal_skip and not kv_offset
    if q_length > 1 and plain:
        tokens = int(q_offset) + q_length  # a static cache has room for more
        plain = attention_mask is None or attention_mask.shape[1] >= tokens
    if q_length == 1 or not plain:
        made: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
        return made
    seen = None if attention_mask is None else attention_mask[:, :tokens].bool()
    if seen is None or bool(seen.all()):
        if tokens == q_length:
            return None
        return torch.ones(batch_size, tokens, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    return seen


READERS.add(NAME)
AttentionInterface.register(NAME, block_sparse_attention)
AttentionMaskInterface.register(NAME, block_sparse_mask)
