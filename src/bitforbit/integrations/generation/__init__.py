"""Text from compressed causal language models: loading, streaming, conversations, and what ``bench`` measures.

Importing this package is light; its modules import torch and transformers. Call :func:`require` before importing them.
"""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec

from bitforbit.errors import MissingDependencyError

PACKAGES = {"torch": (2, 11), "transformers": (5, 17)}
"""What generating text needs, and the oldest versions that are tested."""

PIP_LINE = "pip install {}"


def missing() -> list[str]:
    """The packages that generating text needs and that are not installed, or too old."""
    return [name for name, oldest in PACKAGES.items() if find_spec(name) is None or _version(name) < oldest]


def _version(name: str) -> tuple[int, ...]:
    numbers = re.match(r"(\d+)\.(\d+)", metadata.version(name))
    return (int(numbers[1]), int(numbers[2])) if numbers else (0,)


def require(what: str) -> None:
    """Raise MissingDependencyError, which names ``what`` and the pip line, if a package is missing."""
    names = missing()
    if names:
        wanted = " ".join(f"'{name}>={'.'.join(map(str, PACKAGES[name]))}'" for name in names)
        raise MissingDependencyError(f"{what} needs {' and '.join(names)}: {PIP_LINE.format(wanted)}")
