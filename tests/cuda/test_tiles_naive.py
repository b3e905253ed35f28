"""The reference of the tile layout: what it packs comes back, and lies where the layout says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bitforbit
from bitforbit.archive import decompress
from bitforbit.codecs.base import Bytes
from bitforbit.cuda.tiles import naive
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from helpers.tile_cases import Words, cases, gaussian

CASES = cases()


def _entries(header: Bytes) -> tuple[int, int]:
    entry_bytes, entries = header[68:76].view("<u4").tolist()
    return entries, entry_bytes


@pytest.mark.parametrize("name", CASES)
def test_matrices_come_back_bit_for_bit(name: str) -> None:
    words = CASES[name]
    layout = TileLayout(*words.shape)
    parts = naive.pack(words)
    assert tuple(parts) == PARTS
    assert sum(part.size for part in parts.values()) == layout.nbytes(*_entries(parts["header"]))
    assert np.array_equal(naive.decode(parts, layout), words)


@pytest.mark.parametrize("position", [0, 1, 2, 3, 255, 256, 512 + 8 * 13 + 5, 1023])
def test_each_weight_is_where_the_layout_says(position: int) -> None:
    """One weight that differs in every field from those around it, found by the layout's words alone."""
    i, lane, register, half = position >> 8, position >> 3 & 31, position >> 1 & 3, position & 1
    row, col = lane // 4 + 8 * (register % 2), 16 * i + 2 * (lane % 4) + 8 * (register // 2) + half
    words = np.full((16, 64), 100 << 7, np.uint16)
    words[row, col] = (
        1 << 15 | 105 << 7 | 0x55
    )  # code 5 in a window that begins at 100, if it is the lowest with no escape
    parts = naive.pack(words)
    base = int(parts["header"][64:68].view("<u4")[0])
    code, rest = 105 - base, 100 - base
    pair = 4 * i + register
    j, second = divmod(pair, 2)
    at = 16 * lane + 4 * j if j < 4 else 512 + 16 * lane + 4 * (j - 4)
    word = int(parts["tiles"][at : at + 4].view("<u4")[0])
    turned = (word >> 8 | word << 24) & 0xFFFFFFFF if second else word
    assert turned & 0x807F807F == 0x8055 << 16 * half
    low = [int(parts["tiles"][1024 + 128 * w + 4 * lane :][:4].view("<u4")[0]) for w in range(3)]
    both = [code, rest] if half == 0 else [rest, code]
    if pair < 15:
        assert low[pair // 5] >> (3 * (pair % 5) + 1) & 0x00070007 == both[0] | both[1] << 16
    else:
        assert sum((low[w] & 0x00010001) << w for w in range(3)) == both[0] | both[1] << 16


def test_bits_per_weight_of_gaussian_weights() -> None:
    """Follows from the layout: 11 bits, 16 for an escape, 4 bytes for a tile. Sizes may shrink, never grow."""
    parts = naive.pack(gaussian(1024, 1024))
    assert round(8 * sum(part.size for part in parts.values()) / 1024**2, 3) == 11.215


def test_bits_per_weight_of_the_packaged_model(tmp_path: Path) -> None:
    """All its matrices together; each gains."""
    decompress(Path(bitforbit.__file__).parent / "data" / "demo_model", tmp_path / "model")
    weights = packed = 0
    for words in matrices(tmp_path / "model" / "model.safetensors"):
        size = sum(part.size for part in naive.pack(words).values())
        assert size < words.nbytes
        weights, packed = weights + words.size, packed + size
    assert round(8 * packed / weights, 3) == 11.291


def matrices(path: Path) -> Iterator[Words]:
    """BF16 matrices of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, tensor in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__" and len(tensor["shape"]) == 2:
            assert tensor["dtype"] == "BF16"
            begin, end = (8 + size + offset for offset in tensor["data_offsets"])
            yield np.frombuffer(data[begin:end], np.uint16).reshape(tensor["shape"])
