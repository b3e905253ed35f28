"""Attention of a few queries over a quantized cache, read as it lies in memory."""

from __future__ import annotations


def workspace_bytes() -> int: ...
def attend() -> None: ...
