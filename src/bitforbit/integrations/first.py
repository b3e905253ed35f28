"""A model's first parameter: libraries compute in its dtype (``next(model.parameters()).dtype``), which no part has."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

_METHOD = "parameters"


def attach(model: nn.Module) -> None:
    """Make ``model.parameters()`` begin with one of the dtype of the plain model's first."""
    model.__dict__[_METHOD] = functools.partial(_parameters, model)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`."""
    model.__dict__.pop(_METHOD, None)


def _parameters(model: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    found = list(type(model).parameters(model, recurse))
    dtype = _dtype(model)
    if found and dtype is not None and found[0].dtype != dtype:
        found.sort(key=lambda parameter: parameter.dtype != dtype)
    yield from found


def _dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the plain model's first parameter, so far as is known: compressed ones come first in a module."""
    from bitforbit.nn import compressed_parameters

    for module in model.modules():
        for spec in compressed_parameters(module).values():
            return spec.dtype
        for parameter in module._parameters.values():
            if parameter is not None:
                return parameter.dtype
    return None


def floats_first(model: nn.Module) -> None:
    """Put plain parameters before parts within every module: parts of models ask theirs, too."""
    from bitforbit.nn import Compressed, part_name

    for module in model.modules():
        if not isinstance(module, Compressed):
            continue
        specs = module._bitforbit_specs
        parts = {part_name(part, name) for name, spec in specs.items() for part in spec.part_names}
        own = module._parameters
        last = {name: own.pop(name) for name in list(own) if name in parts}
        own.update(last)
