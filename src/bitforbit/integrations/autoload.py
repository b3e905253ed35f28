"""Makes transformers and diffusers load compressed models without an import by the user.

torch calls :func:`autoload` at the end of ``import torch`` (entry point group ``torch.backends``). It puts a finder on
``sys.meta_path`` that waits for the module in which a library keeps its quantizers, and imports our plug-in for that
library right after it. Until then nothing but this module is imported: standard library only.

An exception in here would break ``import torch`` for everybody, so none leaves this module.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PLUGINS = {
    "diffusers.quantizers.auto": "bitforbit.integrations.diffusers.register",
    "transformers.quantizers.auto": "bitforbit.integrations.transformers.register",
}
"""Module of another library -> module of ours that is imported once the other one is there."""


# No base classes from importlib.abc below: making classes with that metaclass costs more than all the rest.


class _Then:
    """A loader that loads a module as its own loader does, then imports our plug-in."""

    def __init__(self, loader: Loader, plugin: str) -> None:
        self._loader = loader
        self._plugin = plugin

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, as others may ask it for sources or resources.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _import(self._plugin)


class _Finder:
    """Finds the modules of :data:`PLUGINS` as all other finders do, and nothing else."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PLUGINS or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, PLUGINS[fullname])  # type: ignore[assignment]
        return spec


def autoload() -> None:
    """Arrange for the plug-ins. May be called any number of times; never raises."""
    try:
        for name, plugin in PLUGINS.items():
            if name in sys.modules:
                _import(plugin)
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:  # noqa: BLE001 - see the top of this file
        _warn("bitforbit.integrations.autoload", error)


def _import(plugin: str) -> None:
    try:
        importlib.import_module(plugin)
    except Exception as error:  # noqa: BLE001 - see the top of this file
        _warn(plugin, error)


def _warn(what: str, error: Exception) -> None:
    warnings.warn(
        f"{what} could not be loaded, so models compressed by bitforbit cannot be loaded either: "
        f"{type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=2,
    )
