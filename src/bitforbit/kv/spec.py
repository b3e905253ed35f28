"""What a quantized cache is told: bits, groups, the exact window. KIVI (arXiv 2402.02750), section 3.

A row of the batch has L tokens, counted from its first one that is not padding. Its keys and values are, by token:

    [0, sink)                   exact, keys and values alike
    [sink, sink + K)            keys quantized, K = (L - sink) rounded down to a multiple of ``residual``
    [sink + K, L)               keys exact
    [sink, sink + V)            values quantized, V = L - sink - residual (0 if negative)
    [sink + V, L)               values exact

A call attends first and quantizes afterwards, as the published code does: during a call L is the number of tokens
before it, and its own tokens are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitforbit.errors import KvSpecError

BITS = (2, 4, 8)
KEY_GROUPS = (32, 64, 128)
VALUE_GROUPS = (16, 32, 64, 128)
TILE_TOKENS = 32
LARGEST_HEAD = 512


@dataclass(frozen=True)
class KiviSpec:
    """Settings of one layer's cache. Raises KvSpecError for settings that do not exist."""

    k_bits: int = 4
    v_bits: int = 4
    group: int = 32
    """Tokens that share a scale in a channel of the keys; also ``v_group``, unless that is given."""
    v_group: int | None = None
    """Channels that share a scale in a token of the values."""
    residual: int | None = 128
    """The exact window in tokens, a multiple of ``group``; None: everything stays exact."""
    sink: int = 0
    """First tokens that stay exact for ever."""

    def __post_init__(self) -> None:
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if bits not in BITS:
                raise KvSpecError(f"{name}: expected 2, 4 or 8, got {bits!r}; for an exact cache use residual=None")
        if self.group not in KEY_GROUPS:
            raise KvSpecError(f"group: expected 32, 64 or 128 tokens, got {self.group!r}")
        if self.value_group not in VALUE_GROUPS:
            raise KvSpecError(f"v_group: expected 16, 32, 64 or 128 channels, got {self.v_group!r}")
        if self.residual is not None and (self.residual < self.group or self.residual % self.group):
            raise KvSpecError(
                f"residual: expected a positive multiple of group ({self.group}), or None for no quantization, "
                f"got {self.residual!r}"
            )
        if self.sink < 0:
            raise KvSpecError(f"sink: expected 0 or more tokens, got {self.sink!r}")

    @property
    def value_group(self) -> int:
        """Channels that share a scale in a token of the values."""
        return self.group if self.v_group is None else self.v_group

    def check_head(self, head_dim: int) -> None:
        """Raise KvSpecError for a head dimension that these groups do not divide, or that has no kernel."""
        if head_dim % 16 or not 16 <= head_dim <= LARGEST_HEAD:
            raise KvSpecError(f"expected a head dimension that is a multiple of 16 up to 512, got {head_dim}")
        if head_dim % self.value_group:
            fitting = [group for group in VALUE_GROUPS if head_dim % group == 0]
            raise KvSpecError(
                f"expected a head dimension that is a multiple of the values' group ({self.value_group} channels), "
                f"got {head_dim}; set v_group={fitting[-1]}"
            )

    def keys_quantized(self, tokens: int) -> int:
        """Keys that are quantized, from token ``sink`` on, of a row of so many tokens."""
        return 0 if self.residual is None else max(0, tokens - self.sink) // self.residual * self.residual

    def values_quantized(self, tokens: int) -> int:
        """Values that are quantized, from token ``sink`` on, of a row of so many tokens."""
        return 0 if self.residual is None else max(0, tokens - self.sink - self.residual)

    @property
    def key_bits_per_element(self) -> float:
        """Bits of a quantized key's element, scale and zero included."""
        return self.k_bits + 32 / self.group

    @property
    def value_bits_per_element(self) -> float:
        """Bits of a quantized value's element, scale and zero included."""
        return self.v_bits + 32 / self.value_group
