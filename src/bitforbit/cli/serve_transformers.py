"""``transformers serve`` in a process that surely knows compressed models: ``python -m`` this file.

Without our plug-in transformers would fill them with random weights and serve those: it warns, and goes on.
"""

from __future__ import annotations

import importlib
import sys

from bitforbit.cli import EXIT_BAD_INPUT
from bitforbit.errors import BitforbitError


def main() -> None:
    """Run transformers' command line. A model that cannot be loaded is one line on standard error and status 2."""
    try:
        importlib.import_module("bitforbit.integrations.transformers.register")
        from transformers.cli.transformers import app

        app(prog_name="transformers")
    except BitforbitError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
