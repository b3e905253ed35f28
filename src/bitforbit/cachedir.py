"""Where bitforbit keeps what it found out or built on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def directory() -> Path:
    """``$BITFORBIT_CACHE``, else ``$XDG_CACHE_HOME/bitforbit``, else ``~/.cache/bitforbit``. May not exist yet.

    Raises RuntimeError if there is no home directory.
    """
    if chosen := os.environ.get("BITFORBIT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "bitforbit"
