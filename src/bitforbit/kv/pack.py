"""Codes and their parameters to and from a record (:mod:`bitforbit.kv.layout`) in torch, on any device.

Used where there is no kernel, and as the kernels' oracle. Everything here works on some tokens of one segment:
``record`` is a uint8 tensor ``[..., record_bytes]``, tokens are counted from the segment's first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bitforbit.kv.layout import SEGMENT_TILES, SEGMENT_TOKENS, KvLayout, key_position, value_position
from bitforbit.kv.naive import dequantize, quantize_groups
from bitforbit.kv.spec import TILE_TOKENS


class Places(NamedTuple):
    """Where a tile's codes are: code ``[token, channel]`` flattened, byte by byte, and byte and shift of each code."""

    codes: Tensor
    """int64 [tile_bytes, 8 / bits]: the codes of a byte, from its least significant bits on."""
    byte: Tensor
    """int64 [32 * D]"""
    shift: Tensor
    """uint8 [32 * D]"""


@lru_cache(maxsize=64)
def places(kind: str, bits: int, head_dim: int, device: torch.device) -> Places:
    """The places of a tile's codes; ``kind`` is "key" or "value"."""
    byte, shift = [], []
    for token in range(TILE_TOKENS):
        for channel in range(head_dim):
            key = kind == "key"
            word, bit = key_position(bits, token, channel) if key else value_position(bits, head_dim, token, channel)
            byte.append(4 * word + bit // 8)
            shift.append(bit % 8)
    with torch.inference_mode(False):
        byte_of, shift_of = torch.tensor(byte), torch.tensor(shift)
        codes = torch.argsort(byte_of * 8 + shift_of).view(-1, 8 // bits)
        return Places(codes.to(device), byte_of.to(device), shift_of.to(torch.uint8).to(device))


def pack_codes(kind: str, codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., 32 n, D]`` as bytes ``[..., n * tile_bytes]``; ``kind`` is "key" or "value"."""
    table = places(kind, bits, codes.shape[-1], codes.device)
    tiles = codes.unflatten(-2, (-1, TILE_TOKENS)).flatten(-2)[..., table.codes]  # [..., n, bytes, codes of a byte]
    packed = tiles[..., 0]
    for place in range(1, 8 // bits):
        packed = packed | tiles[..., place] << place * bits
    return packed.flatten(-2)


def unpack_codes(kind: str, packed: Tensor, bits: int, head_dim: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 ``[..., 32 n, D]``."""
    table = places(kind, bits, head_dim, packed.device)
    tiles = packed.unflatten(-1, (-1, TILE_TOKENS * head_dim * bits // 8))
    codes = tiles[..., table.byte] >> table.shift & 2**bits - 1
    return codes.unflatten(-1, (TILE_TOKENS, head_dim)).flatten(-3, -2)


def write_keys(record: Tensor, layout: KvLayout, first: int, x: Tensor, params: torch.dtype) -> Tensor:
    """Quantize keys ``x`` [..., n, D] and store them as tokens ``first`` to first + n, both multiples of ``group``.

    Returns which groups are not finite: bool ``[..., n / group, D]``.
    """
    spec = layout.spec
    groups = x.unflatten(-2, (-1, spec.group)).mT  # [..., groups, D, G]
    codes, scale, zero = quantize_groups(groups, spec.k_bits, params)
    begin = first // TILE_TOKENS * layout.key_tile_bytes
    packed = pack_codes("key", codes.mT.flatten(-3, -2), spec.k_bits)
    record[..., begin : begin + packed.shape[-1]] = packed
    begin = layout.key_params + first // spec.group * layout.key_group_bytes
    params_of = torch.stack([scale, zero], -2).flatten(-3).view(torch.uint8)
    record[..., begin : begin + params_of.shape[-1]] = params_of
    return scale.isnan()


def write_values(record: Tensor, layout: KvLayout, first: int, x: Tensor, params: torch.dtype) -> Tensor:
    """Quantize values ``x`` [..., n, D] and store them as tokens ``first`` to first + n, whose place holds zeros.

    Returns which groups are not finite: bool ``[..., n, D / v_group]``.
    """
    spec = layout.spec
    codes, scale, zero = quantize_groups(x.unflatten(-1, (-1, spec.value_group)), spec.v_bits, params)
    tile, before = divmod(first, TILE_TOKENS)
    after = -(before + x.shape[-2]) % TILE_TOKENS
    # Whole tiles, zeros around the new tokens, are put over those that are there.
    codes = torch.nn.functional.pad(codes.flatten(-2), (0, 0, before, after))
    part = record[..., layout.value_codes : layout.value_params]
    _put_over(part, tile * layout.value_tile_bytes, pack_codes("value", codes, spec.v_bits))
    both = torch.nn.functional.pad(torch.stack([scale, zero], -1), (0, 0, 0, 0, before, after))  # [..., 32 n, C, 2]
    both = both.unflatten(-3, (-1, TILE_TOKENS)).movedim(-3, -1)  # [..., n, C, 2, 32]
    part = record[..., layout.value_params :]
    _put_over(part, tile * layout.value_params_tile_bytes, both.contiguous().flatten(-4).view(torch.uint8))
    return scale.isnan()


def read_keys(record: Tensor, layout: KvLayout, first: int, last: int, params: torch.dtype) -> Tensor:
    """Keys ``first`` to ``last``, dequantized: float32 ``[..., last - first, D]``."""
    spec = layout.spec
    group, end = first // spec.group, -(-last // spec.group)
    size = spec.group // TILE_TOKENS * layout.key_tile_bytes  # of a group
    codes = unpack_codes("key", record[..., group * size : end * size], spec.k_bits, layout.head_dim)
    both = record[..., layout.key_params : layout.value_codes].view(params)
    both = both.unflatten(-1, (-1, 2, 1, layout.head_dim))[..., group:end, :, :, :]
    x = dequantize(codes.unflatten(-2, (-1, spec.group)), both[..., 0, :, :], both[..., 1, :, :]).flatten(-3, -2)
    return x[..., first - group * spec.group : last - group * spec.group, :]


def read_values(record: Tensor, layout: KvLayout, first: int, last: int, params: torch.dtype) -> Tensor:
    """Values ``first`` to ``last``, dequantized: float32 ``[..., last - first, D]``."""
    spec, size = layout.spec, layout.value_tile_bytes
    tile, end = first // TILE_TOKENS, -(-last // TILE_TOKENS)
    part = record[..., layout.value_codes : layout.value_params]
    codes = unpack_codes("value", part[..., tile * size : end * size], spec.v_bits, layout.head_dim)
    size = layout.value_params_tile_bytes
    both = record[..., layout.value_params :][..., tile * size : end * size].view(params)
    both = both.unflatten(-1, (-1, layout.head_dim // spec.value_group, 2, TILE_TOKENS))
    both = both.movedim(-1, -3).flatten(-4, -3)[..., None]  # [..., 32 n, C, 2, 1]
    x = dequantize(codes.unflatten(-1, (-1, spec.value_group)), both[..., 0, :], both[..., 1, :]).flatten(-2)
    return x[..., first - tile * TILE_TOKENS : last - tile * TILE_TOKENS, :]


def clear_keys(record: Tensor, layout: KvLayout, first: int) -> None:
    """Zeros in place of the keys from token ``first`` on, a multiple of ``group``."""
    record[..., first // TILE_TOKENS * layout.key_tile_bytes : layout.key_params] = 0
    begin = layout.key_params + first // layout.spec.group * layout.key_group_bytes
    record[..., begin : layout.value_codes] = 0


def clear_values(record: Tensor, layout: KvLayout, first: int) -> None:
    """Zeros in place of the values from token ``first`` on."""
    tile, kept = divmod(first, TILE_TOKENS)
    if tile >= SEGMENT_TILES:
        return
    codes = record[..., layout.value_codes : layout.value_params].unflatten(-1, (SEGMENT_TILES, -1))
    params = record[..., layout.value_params :].unflatten(-1, (SEGMENT_TILES, -1))
    if kept:
        old = unpack_codes("value", codes[..., tile, :], layout.spec.v_bits, layout.head_dim)
        old[..., kept:, :] = 0
        codes[..., tile, :] = pack_codes("value", old, layout.spec.v_bits)
        params[..., tile, :].view(torch.int16).unflatten(-1, (-1, TILE_TOKENS))[..., kept:] = 0
        tile += 1
    codes[..., tile:, :] = 0
    params[..., tile:, :] = 0


def split(first: int, last: int) -> list[tuple[int, int, int]]:
    """Tokens ``first`` to ``last`` by segment: (segment, first and last token counted from the segment's first)."""
    pieces = []
    while first < last:
        segment = first // SEGMENT_TOKENS
        end = min(last, (segment + 1) * SEGMENT_TOKENS)
        pieces.append((segment, first - segment * SEGMENT_TOKENS, end - segment * SEGMENT_TOKENS))
        first = end
    return pieces


def _put_over(part: Tensor, begin: int, packed: Tensor) -> None:
    place = part[..., begin : begin + packed.shape[-1]]
    place |= packed
