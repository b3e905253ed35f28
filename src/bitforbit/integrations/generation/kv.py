"""Which key-value cache to generate with, as the command line names it: ``16``, ``8``, ``4``, ``2``, ``k4v2``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bitforbit.errors import UsageError
from bitforbit.kv.spec import KiviSpec

_NAME = re.compile(r"(?P<both>\d+)|k(?P<k>\d+)v(?P<v>\d+)")


@dataclass(frozen=True)
class KvChoice:
    """A cache by name. ``spec`` None: the model's own."""

    name: str
    spec: KiviSpec | None

    @property
    def lossy(self) -> bool:
        """Whether keys and values are rounded."""
        return self.spec is not None

    def make(self, model: Any) -> Any:
        """A new cache, the model's attention being set for it; None for the model's own. Raises KvCacheError."""
        if self.spec is None:
            return None
        from bitforbit.integrations.transformers.kv import kivi_cache

        spec = self.spec
        return kivi_cache(
            model,
            k_bits=spec.k_bits,
            v_bits=spec.v_bits,
            group=spec.group,
            residual=spec.residual,
            sink=spec.sink,
        )

    def to_json(self) -> dict[str, Any]:
        """The settings."""
        if self.spec is None:
            return {"name": self.name, "lossy": False}
        names = ("k_bits", "v_bits", "group", "residual", "sink")
        return {"name": self.name, "lossy": True, **{name: getattr(self.spec, name) for name in names}}


OWN = KvChoice("16", None)
"""The model's own cache."""


def parse(name: str, group: int = 32, residual: int = 128, sink: int = 4) -> KvChoice:
    """A cache by name. Raises UsageError, or KvSpecError for settings that do not exist."""
    text = name.strip().lower()
    found = _NAME.fullmatch(text)
    if found is None:
        raise UsageError(f"--kv: expected 16, 8, 4, 2 or bits of keys and values such as k4v2, got {name!r}")
    if text in ("16", "k16v16"):
        return KvChoice("16", None)
    k_bits, v_bits = (int(found["both"] or found[key]) for key in ("k", "v"))
    label = str(k_bits) if k_bits == v_bits else f"k{k_bits}v{v_bits}"
    return KvChoice(label, KiviSpec(k_bits, v_bits, group=group, residual=residual, sink=sink))
