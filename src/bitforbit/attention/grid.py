"""Blocks of queries against blocks of keys: which exist, which a causal mask leaves whole, and their share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitforbit.errors import AttentionError


@dataclass(frozen=True)
class Grid:
    """Sizes of a problem in blocks of ``block`` tokens; the last block of each side is as long as it is.

    ``causal``: the queries are the last ``q_tokens`` of the ``kv_tokens``, and see what is not after them. Raises
    AttentionError for sizes that make no sense.
    """

    q_tokens: int
    kv_tokens: int
    block: int = 128
    causal: bool = True

    def __post_init__(self) -> None:
        if self.q_tokens < 1 or self.kv_tokens < 1 or self.block < 1:
            raise AttentionError(
                f"expected at least one query, one key and one token a block, got {self.q_tokens} queries, "
                f"{self.kv_tokens} keys and blocks of {self.block}"
            )
        if self.causal and self.q_tokens > self.kv_tokens:
            raise AttentionError(
                f"expected as many keys as queries or more under a causal mask, got {self.q_tokens} queries and "
                f"{self.kv_tokens} keys"
            )

    @property
    def offset(self) -> int:
        """Position of the first query among the keys."""
        return self.kv_tokens - self.q_tokens

    @property
    def q_blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.q_tokens // self.block)

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_tokens // self.block)

    def positions(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Positions among the keys of each query block's first and last token, two times int64 ``[q blocks, 1]``."""
        first = torch.arange(self.q_blocks, device=device)[:, None] * self.block
        last = (first + self.block).clamp(max=self.q_tokens) - 1
        return first + self.offset, last + self.offset

    def columns(self, device: torch.device | None = None) -> Tensor:
        """Indices of the key blocks, int64 ``[1, kv blocks]``."""
        return torch.arange(self.kv_blocks, device=device)[None, :]

    def visible(self, device: torch.device | None = None) -> Tensor:
        """Blocks in which some query sees some key, bool ``[q blocks, kv blocks]``."""
        if not self.causal:
            return torch.ones(self.q_blocks, self.kv_blocks, dtype=torch.bool, device=device)
        return self.columns(device) * self.block <= self.positions(device)[1]

    def full(self, device: torch.device | None = None) -> Tensor:
        """Blocks in which every query sees every key, bool ``[q blocks, kv blocks]``."""
        if not self.causal:
            return self.visible(device)
        return ((self.columns(device) + 1) * self.block).clamp(max=self.kv_tokens) - 1 <= self.positions(device)[0]

    def own(self, device: torch.device | None = None) -> Tensor:
        """Blocks that hold keys of the queries' own tokens, bool ``[q blocks, kv blocks]``: two a row where the first
        query lies inside a block. Without a causal mask the queries are matched with the last keys, too."""
        first, last = self.positions(device)
        columns = self.columns(device)
        block = self.block
        return (columns >= first.div(block, rounding_mode="floor")) & (
            columns <= last.div(block, rounding_mode="floor")
        )

    def distance(self, device: torch.device | None = None) -> Tensor:
        """How many blocks a key block lies before the last of the queries' own, int64 ``[q blocks, kv blocks]``."""
        return self.positions(device)[1].div(self.block, rounding_mode="floor") - self.columns(device)

    def density(self, layout: Tensor) -> float:
        """Blocks that a layout keeps, as a share of those that are visible."""
        visible = self.visible(layout.device)
        return float((layout & visible).sum() / (visible.sum() * layout[..., 0, 0].numel()))

    def check(self, layout: Tensor) -> None:
        """Raise AttentionError for a layout of another grid."""
        expected = (self.q_blocks, self.kv_blocks)
        if layout.ndim != 4 or layout.dtype != torch.bool or tuple(layout.shape[2:]) != expected:
            raise AttentionError(
                f"layout: expected bool [B, H, {expected[0]}, {expected[1]}] for {self.q_tokens} queries and "
                f"{self.kv_tokens} keys in blocks of {self.block}, got {layout.dtype} {tuple(layout.shape)}"
            )
