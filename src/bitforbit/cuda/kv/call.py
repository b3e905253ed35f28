"""One layer's cache as kernels see it: settings, sizes, addresses in device memory."""

from __future__ import annotations

from dataclasses import dataclass

from bitforbit.errors import UsageError

SEGMENT_TOKENS = 512
TILE_TOKENS = 32
ALIGNMENT = 16
LARGEST_GRID = 65535
LARGEST_HEAD = 256
"""Channels of a head that the kernels have registers for."""

Defines = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KvCall:
    """A layer's cache: settings as in ``kv.spec``, memory as in ``kv.layout``. Addresses are on 16 bytes."""

    batch: int
    heads: int
    """Of keys and values."""
    head_dim: int
    k_bits: int
    v_bits: int
    group: int
    v_group: int
    residual: int
    sink: int
    capacity: int
    """Of the windows, in tokens."""
    dtype: str
    """"BF16", "F16" or "F32"."""
    segments: int
    """Address of a table: uint64 addresses of the segments, as many as the call's tokens need."""
    window_k: int
    window_v: int
    sink_k: int
    sink_v: int
    start: int
    """Address of int32 [batch]."""
    tokens: int
    """Slots that the quantized part was made of; with a counter, as many as the launch is right for."""
    counter: int = 0
    """Address of an int32 with these slots, for launches that graphs replay; 0: ``tokens`` it is."""

    def check(self) -> None:
        """Raise UsageError for what no kernel takes."""
        addresses = (self.segments, self.window_k, self.window_v, self.sink_k, self.sink_v)
        if any(address % ALIGNMENT for address in addresses) or self.start % 4 or self.counter % 4:
            raise UsageError(f"expected addresses on {ALIGNMENT} bytes, got {self}")
        if self.head_dim % 16 or not 16 <= self.head_dim <= LARGEST_HEAD or self.head_dim % self.v_group:
            raise UsageError(
                f"expected a head dimension that is a multiple of 16 and of {self.v_group}, up to {LARGEST_HEAD}, "
                f"got {self.head_dim}"
            )
        if self.residual < self.group or self.residual % self.group:
            raise UsageError(
                f"expected a window of at least a group ({self.group}), of whole ones, got {self.residual}"
            )
        if self.batch * self.heads > LARGEST_GRID:
            raise UsageError(
                f"expected at most {LARGEST_GRID} rows and heads together, got {self.batch} * {self.heads}: "
                "use smaller batches"
            )

    @property
    def defines(self) -> Defines:
        """Macros of its kernels."""
        return defines(self.head_dim, self.k_bits, self.v_bits, self.group, self.v_group)

    def keys_quantized(self, tokens: int) -> int:
        """Keys that are quantized of a row of so many tokens."""
        return max(0, tokens - self.sink) // self.residual * self.residual

    def values_quantized(self, tokens: int) -> int:
        """Values that are quantized of a row of so many tokens."""
        return max(0, tokens - self.sink - self.residual)


def defines(head_dim: int, k_bits: int, v_bits: int, group: int, v_group: int) -> Defines:
    """Macros of the kernels for settings."""
    names = ("HEAD", "K_BITS", "V_BITS", "GROUP", "V_GROUP")
    values = (head_dim, k_bits, v_bits, group, v_group)
    return tuple((f"BITFORBIT_{name}", str(value)) for name, value in zip(names, values, strict=True))
