"""Text from compressed causal language models: loading, streaming, conversations, and what ``bench`` measures.

Importing this package is light; its modules import torch and transformers. Call :func:`require` before importing them.
"""

from __future__ import annotations

from importlib.util import find_spec

from bitforbit.errors import MissingDependencyError

PACKAGES = ("torch", "transformers")


def missing() -> list[str]:
    """The packages that generating text needs and that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def require(what: str) -> None:
    """Raise MissingDependencyError, which names ``what`` and the pip line, if a package is missing."""
    names = missing()
    if names:
        raise MissingDependencyError(
            f"{what} needs {' and '.join(names)}: pip install {' '.join(names)} (for a machine without GPU: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu, then pip install transformers)"
        )
