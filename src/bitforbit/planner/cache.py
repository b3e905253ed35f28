"""Bytes of the keys and values of one layer: transformers' own cache, and :class:`bitforbit.kv.state.KvState`'s."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitforbit.errors import PlanError
from bitforbit.kv.layout import SEGMENT_TOKENS, KvLayout
from bitforbit.kv.spec import VALUE_GROUPS, KiviSpec

_BLOCK_QUERIES = 256
"""Queries whose scores :mod:`bitforbit.attention.online` computes at a time."""


@dataclass(frozen=True)
class KvSetting:
    """A cache by name; ``spec`` None: the model's own."""

    name: str
    spec: KiviSpec | None = None


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer: ``heads`` key-value heads, ``item`` bytes of a number, ``window`` tokens at most.

    ``group``: query heads per key-value head. ``scores``: how attention that caps its logits is computed, ``"whole"``:
    by transformers, all at once; ``"blocks"``: by the attention of quantized caches; "": logits are not capped.
    """

    spec: KiviSpec | None
    heads: int
    head_dim: int
    item: int
    window: int | None = None
    group: int = 1
    scores: str = ""

    @classmethod
    def of(
        cls, setting: KvSetting, heads: int, head_dim: int, item: int, window: int | None, group: int = 1,
        caps: bool = False,
    ) -> LayerCache:  # fmt: skip
        """Layers with a window stay the model's own. Raises KvSpecError."""
        spec = setting.spec if window is None else None
        if spec is not None and spec.v_group is None and head_dim % spec.value_group:
            fitting = [group for group in VALUE_GROUPS if group <= spec.group and head_dim % group == 0]
            spec = replace(spec, v_group=fitting[-1]) if fitting else spec
        if spec is not None:
            spec.check_head(head_dim)
        scores = "" if not caps else "whole" if setting.spec is None else "blocks"
        return cls(spec, heads, head_dim, item, window, group, scores)

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token that is not quantized."""
        return 2 * self.heads * self.head_dim * self.item

    def resident(self, tokens: int, batch: int = 1) -> int:
        """Bytes after ``tokens`` tokens in each of ``batch`` rows without padding."""
        if tokens < 0 or batch < 1:
            raise PlanError(f"expected tokens >= 0 and batch >= 1, got {tokens} and {batch}")
        spec = self.spec
        if spec is None or spec.residual is None:
            return batch * min(tokens, self.window or tokens) * self.token_bytes
        quantized = max(spec.keys_quantized(tokens), spec.values_quantized(tokens))
        segments = -(-quantized // SEGMENT_TOKENS)
        # The window has grown to its full size, a slot more than ``residual``, once so many tokens were there.
        exact = min(tokens, spec.residual + 1) + spec.sink
        packed = segments * self.heads * KvLayout(spec, self.head_dim).record_bytes
        return batch * (packed + exact * self.token_bytes)

    def read(self, tokens: int, batch: int = 1) -> float:
        """Bytes that a step reads."""
        if self.spec is None or self.spec.residual is None:
            return float(self.resident(tokens, batch))
        spec, half = self.spec, self.heads * self.head_dim
        keys, values = spec.keys_quantized(tokens), spec.values_quantized(tokens)
        packed = half * (keys * spec.key_bits_per_element + values * spec.value_bits_per_element) / 8
        return batch * (packed + half * self.item * (2 * tokens - keys - values))

    def passing(self, tokens: int, batch: int, call: int) -> int:
        """Bytes beside it while attention is computed, in the last of calls of ``call`` tokens: an estimate.

        The model's own cache copies keys into a longer tensor. Where a call sees earlier ones, transformers passes a
        mask, for which keys and values are repeated for every query head. Capped logits: all scores, in the model's
        dtype and in FP32. A quantized cache: the call's own keys and values, a segment and its scores in FP32.
        """
        call, length = min(call, tokens), min(SEGMENT_TOKENS, tokens)
        heads = self.heads * self.group
        own = self.resident(tokens, batch)
        # Of a row: three steps of the scores of a block of queries, and the output. Both in FP32.
        blocks = 12 * heads * min(call, _BLOCK_QUERIES) * length + 4 * heads * call * self.head_dim
        if self.spec is None or self.spec.residual is None:
            if self.scores == "blocks":
                return own // 2 + (blocks if call > 1 else 0)
            copied = own // 2
            if self.group > 1 and (self.scores or 1 < call < tokens):
                copied = own * self.group
            seen = min(tokens, (self.window or tokens) + call)
            return copied + (batch * heads * call * seen * (3 * self.item + 4) if self.scores else 0)
        if call == 1:
            return 0
        segment = 16 * self.heads * self.head_dim * length
        return batch * call * self.token_bytes + (blocks + segment if self.scores or call < tokens else 0)
