"""Where everything of a quantized cache lies in memory. Private: never on disk. Normative for all kernels.

A layer's cache, for B rows, H key-value heads, D channels per head, has

``segments``: byte tensors [B, H, record], each for 512 tokens of every row: segment s holds the row's quantized tokens
    512 s to 512 s + 511, counted from its token ``sink`` (bitforbit.kv.spec). Zeros where nothing was written. A record
    has four parts, each made of what 16 tiles of 32 tokens need, tile after tile:

    ``key codes``     per tile 4 D k_bits bytes: 32-bit words [D/16][4][8 k_bits/2], see below
    ``key params``    per group of tokens (not per tile) two rows of D 16-bit numbers: scales, then zeros
    ``value codes``   per tile 4 D v_bits bytes: 32-bit words, see below
    ``value params``  per tile 16-bit numbers [D/v_group][2][32]: of each group of channels the scales of the 32 tokens,
                      then their zeros

``window_k``, ``window_v``: exact keys and values [B, H, capacity, D] in the model's dtype. Slot x of the batch (0 is
    the first column of the padded batch) lies at x mod capacity. Capacity is ``residual`` + 1, less while there are
    fewer slots, more if everything is exact.
``sink_k``, ``sink_v``: [B, H, sink, D], the first tokens of each row.
``start``: int32 [B], slots of padding on the left of each row. Row b's token i is slot start[b] + i.

Codes of b bits, E = 8 / b (the tokens of a key word). Elements that a product takes as a pair stand 16 bits apart, so
that one mask gives both, and a tile's words are in the order of the matrix instruction mma.m16n8k16 (fragment B).

    Key of token i (0-31), channel c:      step = c div 16, t = (c mod 16) div 4, m = c mod 4
        word  = (step * 4 + t) * (32/E) + i div E
        shift = 16 * (m mod 2) + b * (2 * (i mod E) + m div 2)
    Value of token i, channel c:           t = i div 8, half = (i div 4) mod 2, j = i mod 4
        b = 4:  word = t * D + c                       shift = 16 * half + 4 * j
        b = 2:  word = t * (D/2) + c div 2             shift = 16 * half + 2 * (4 * (c mod 2) + j)
        b = 8:  word = (t * 2 + j div 2) * D + c       shift = 16 * half + 8 * (j mod 2)

Scales and zeros are float16 for float16 models, else bfloat16 ("P" below). Of a group with least element lo and
largest hi (all arithmetic in float32, to nearest even, subnormals kept; n = 2^b - 1):

    zero  = lo rounded down to P (the least finite P at least), +0 for -0
    range = (hi - zero) / n, or hi / n - zero / n if hi - zero overflows
    scale = 0 if hi <= zero, else range rounded up to P, and at least the least normal bfloat16 2^-126 (for P bfloat16)
            or the least float16 2^-24
    code  = round to even((x - zero) * (1 / scale)), within 0 and n; 0 where scale is 0
    and x becomes zero + scale * code (a product, then a sum, each rounded to float32).

So the extremes of a group are within reach of its codes whatever the rounding of scale and zero, a constant group is
exact in the model's dtype (but for float32 models), and the error is at most about scale / 2. A group with a NaN or an
infinity gets NaN (0x7FC0, or 0x7E00 for float16) for scale and zero, and codes 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitforbit.kv.spec import TILE_TOKENS, KiviSpec

SEGMENT_TOKENS = 512
SEGMENT_TILES = SEGMENT_TOKENS // TILE_TOKENS


def key_position(bits: int, token: int, channel: int) -> tuple[int, int]:
    """Word of the tile and shift of the code of a key; ``token`` 0-31."""
    per_word = 8 // bits
    step, t, m = channel // 16, channel % 16 // 4, channel % 4
    word = (step * 4 + t) * (TILE_TOKENS // per_word) + token // per_word
    return word, 16 * (m % 2) + bits * (2 * (token % per_word) + m // 2)


def value_position(bits: int, head_dim: int, token: int, channel: int) -> tuple[int, int]:
    """Word of the tile and shift of the code of a value; ``token`` 0-31."""
    t, half, j = token // 8, token // 4 % 2, token % 4
    if bits == 4:
        return t * head_dim + channel, 16 * half + 4 * j
    if bits == 2:
        return t * (head_dim // 2) + channel // 2, 16 * half + 2 * (4 * (channel % 2) + j)
    return (t * 2 + j // 2) * head_dim + channel, 16 * half + 8 * (j % 2)


@dataclass(frozen=True)
class KvLayout:
    """Sizes and offsets, in bytes, of a record."""

    spec: KiviSpec
    head_dim: int

    @property
    def key_tile_bytes(self) -> int:
        """Codes of 32 keys."""
        return TILE_TOKENS * self.head_dim * self.spec.k_bits // 8

    @property
    def key_group_bytes(self) -> int:
        """Scales and zeros of a group of keys."""
        return 4 * self.head_dim

    @property
    def value_tile_bytes(self) -> int:
        """Codes of 32 values."""
        return TILE_TOKENS * self.head_dim * self.spec.v_bits // 8

    @property
    def value_params_tile_bytes(self) -> int:
        """Scales and zeros of 32 values."""
        return 4 * TILE_TOKENS * (self.head_dim // self.spec.value_group)

    @property
    def key_params(self) -> int:
        """Offset of the part ``key params`` in a record; ``key codes`` are at 0."""
        return SEGMENT_TILES * self.key_tile_bytes

    @property
    def value_codes(self) -> int:
        """Offset of the part ``value codes`` in a record."""
        return self.key_params + SEGMENT_TOKENS // self.spec.group * self.key_group_bytes

    @property
    def value_params(self) -> int:
        """Offset of the part ``value params`` in a record."""
        return self.value_codes + SEGMENT_TILES * self.value_tile_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of a record: 512 tokens of one row and head."""
        return self.value_params + SEGMENT_TILES * self.value_params_tile_bytes
