"""Lossless compression of model weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitforbit import errors
    from bitforbit.archive.checkpoint import safe_open
    from bitforbit.archive.compress import compress
    from bitforbit.archive.decompress import decompress
    from bitforbit.archive.inspect import inspect
    from bitforbit.archive.merge import merge
    from bitforbit.archive.verify import verify
    from bitforbit.arrays import Encoded, encode
    from bitforbit.integrations.models import compress_model, decompress_model
    from bitforbit.integrations.transformers.config import BitforbitConfig
    from bitforbit.integrations.transformers.kv import KiviCache, kivi_cache

__version__ = "0.1.0"

__all__ = [
    "BitforbitConfig",
    "Encoded",
    "KiviCache",
    "__version__",
    "compress",
    "compress_model",
    "decompress",
    "decompress_model",
    "encode",
    "errors",
    "inspect",
    "kivi_cache",
    "merge",
    "safe_open",
    "verify",
]

_HOMES = {
    "BitforbitConfig": "bitforbit.integrations.transformers.register",
    "Encoded": "bitforbit.arrays",
    "KiviCache": "bitforbit.integrations.transformers.kv",
    "compress": "bitforbit.archive",
    "compress_model": "bitforbit.integrations.models",
    "decompress": "bitforbit.archive",
    "decompress_model": "bitforbit.integrations.models",
    "encode": "bitforbit.arrays",
    "inspect": "bitforbit.archive",
    "kivi_cache": "bitforbit.integrations.transformers.kv",
    "merge": "bitforbit.archive",
    "safe_open": "bitforbit.archive.checkpoint",
    "verify": "bitforbit.archive",
}

_MODULES = ("attention", "cpu", "errors", "iomodel", "kv", "nn", "offload", "ops", "planner")
"""Modules that the guides speak of, which need no import of their own."""


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that ``import bitforbit`` is instant."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"bitforbit.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# torch does this by an entry point, which a source tree does not have, and which can be turned off: compressed models
# would then load with random weights. Standard library only, unless transformers is there already.
importlib.import_module("bitforbit.integrations.autoload").autoload()
