from __future__ import annotations

from helpers.kv_paths import emulated, one_thread, path

__all__ = ["emulated", "one_thread", "path"]
