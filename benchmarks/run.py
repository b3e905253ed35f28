"""Run every benchmark of the CPU: ``python -m benchmarks.run [NAME ...]``."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "codec",
    "df11",
    "archive",
    "cpu_linear",
    "model",
    "offload",
    "kv_attention",
    "kv_memory",
    "kv_quality",
    "block_sparse",
    "io_attention",
)


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all."""
    unknown = set(names) - set(NAMES)
    if unknown:
        print(f"expected names among {', '.join(NAMES)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    for name in names or NAMES:
        print(f"\n== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
