"""What the loops of FlashAttention run over: tiles, the schedule, and a slow memory that keeps a record of its use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bitforbit.errors import AttentionError

Order = Literal["kv", "q"]


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile of Q (and O, dO, dQ) and of a tile of K and V (and dK, dV)."""

    q: int
    kv: int

    def __post_init__(self) -> None:
        if self.q < 1 or self.kv < 1:
            raise AttentionError(f"expected tiles of at least one row, got q={self.q}, kv={self.kv}")

    @classmethod
    def for_memory(cls, words: int, head_dim: int) -> Tiles:
        """FlashAttention's choice for a fast memory of so many words (2205.14135, algorithm 1, line 1)."""
        if words < 4 * head_dim:
            raise AttentionError(f"expected a fast memory of at least 4 * head_dim = {4 * head_dim} words, got {words}")
        kv = -(-words // (4 * head_dim))
        return cls(min(kv, head_dim), kv)


@dataclass(frozen=True)
class Access:
    """One tile that moves between slow and fast memory."""

    kind: Literal["read", "write"]
    name: str
    tile: int
    words: int


@dataclass
class Memory:
    """Slow memory of one head: matrices by name, read and written by tiles of rows, with a record of it."""

    rows: dict[str, int]
    """Rows of a tile, by the matrix's name."""
    matrices: dict[str, Tensor]
    record: list[Access] = field(default_factory=list)

    def read(self, name: str, tile: int) -> Tensor:
        """A copy of one tile."""
        found = self.matrices[name][self._rows(name, tile)].clone()
        self.record.append(Access("read", name, tile, found.numel()))
        return found

    def write(self, name: str, tile: int, value: Tensor) -> None:
        """Store one tile."""
        self.matrices[name][self._rows(name, tile)] = value
        self.record.append(Access("write", name, tile, value.numel()))

    def _rows(self, name: str, tile: int) -> slice:
        return slice(tile * self.rows[name], (tile + 1) * self.rows[name])


@dataclass(frozen=True)
class Head:
    """What one head computes besides its matrices: sizes, tiles, what is seen."""

    q_tokens: int
    kv_tokens: int
    tiles: Tiles
    scaling: float
    causal: bool = False
    mask: Tensor | None = None
    """Bool ``[q_tokens, kv_tokens]``; true: seen."""
    layout: Tensor | None = None
    """Bool ``[q tiles, kv tiles]``; false: left out."""

    @property
    def q_tiles(self) -> int:
        """Tiles of the queries, the last one as long as it is."""
        return -(-self.q_tokens // self.tiles.q)

    @property
    def kv_tiles(self) -> int:
        """Tiles of the keys, the last one as long as it is."""
        return -(-self.kv_tokens // self.tiles.kv)

    def computed(self, i: int, j: int) -> bool:
        """Whether tile j of the keys is computed for tile i of the queries."""
        if self.layout is not None and not bool(self.layout[i, j]):
            return False
        last_query = min((i + 1) * self.tiles.q, self.q_tokens) - 1
        return not self.causal or j * self.tiles.kv <= last_query + self.kv_tokens - self.q_tokens

    def pairs(self, order: Order) -> Iterator[tuple[int, list[int]]]:
        """The schedule: each tile of the outer loop with those of the inner loop that are computed for it."""
        if order == "kv":
            for j in range(self.kv_tiles):
                yield j, [i for i in range(self.q_tiles) if self.computed(i, j)]
        else:
            for i in range(self.q_tiles):
                yield i, [j for j in range(self.kv_tiles) if self.computed(i, j)]

    def scores(self, q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
        """Scaled scores of two tiles, ``[rows of Q, rows of K]``; -inf: not seen."""
        queries = torch.arange(q.shape[0], device=q.device)[:, None] + i * self.tiles.q
        keys = torch.arange(k.shape[0], device=q.device)[None, :] + j * self.tiles.kv
        scores = self.scaling * (q @ k.T)
        if self.causal:
            scores = scores.masked_fill(keys > queries + (self.kv_tokens - self.q_tokens), -math.inf)
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask[queries, keys], -math.inf)
        return scores


def layout_mask(layout: Tensor, tiles: Tiles, q_tokens: int, kv_tokens: int) -> Tensor:
    """The layout as a mask of tokens, ``[B, H, q_tokens, kv_tokens]``: the definition of what is seen."""
    tokens = layout.repeat_interleave(tiles.q, -2)[..., :q_tokens, :]
    return tokens.repeat_interleave(tiles.kv, -1)[..., :kv_tokens]
