"""State dicts in which compressed parameters are found under their plain names, too.

diffusers looks up the shapes of weights there when it loads a LoRA. Who goes through a state dict, or saves it, sees
the parts only.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

from torch import nn

from bitforbit.integrations.names import split
from bitforbit.nn import compressed_parameters

_METHOD = "state_dict"


def attach(model: nn.Module) -> None:
    """Make ``model.state_dict()`` such a dictionary."""
    model.__dict__[_METHOD] = functools.partial(_state_dict, model)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`."""
    model.__dict__.pop(_METHOD, None)


class StateDict(OrderedDict[str, Any]):
    """A state dict that answers for plain names as well. Copies of it are ordinary ones."""

    def __init__(self, model: nn.Module, found: OrderedDict[str, Any]) -> None:
        super().__init__(found)
        self._model = model
        self._metadata = getattr(found, "_metadata", None)

    def _module_of(self, name: object) -> nn.Module | None:
        module_name, parameter = split(name) if isinstance(name, str) else ("", "")
        try:
            module = self._model.get_submodule(module_name)
        except AttributeError:
            return None
        return module if parameter in compressed_parameters(module) else None

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self._module_of(name) is not None

    def __missing__(self, name: str) -> Any:
        module = self._module_of(name)
        if module is None:
            raise KeyError(name)
        return getattr(module, split(name)[1])

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)


def _state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    found = type(model).state_dict(model, *args, **kwargs)
    return found if args or kwargs.get("destination") is not None else StateDict(model, found)
