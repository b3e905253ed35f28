"""Quantized key-value caches after KIVI (arXiv 2402.02750). Lossy, so nothing here happens unless it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitforbit.kv.spec import KiviSpec

if TYPE_CHECKING:
    from bitforbit.integrations.transformers.kv import KiviCache, kivi_cache

__all__ = ["KiviCache", "KiviSpec", "kivi_cache"]

# What needs transformers is imported at its first use.
_TRANSFORMERS = "bitforbit.integrations.transformers.kv"


def __getattr__(name: str) -> Any:
    if name not in ("KiviCache", "kivi_cache"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_TRANSFORMERS), name)
    globals()[name] = value
    return value
