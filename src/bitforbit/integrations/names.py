"""Full names of parameters, and of the parts of those that are compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from bitforbit.integrations.options import Options
    from bitforbit.nn import CompressedSpec

# Nothing here may be imported from bitforbit.nn at once: that would slow down the import of the hosts.


def split(name: str) -> tuple[str, str]:
    """Module and parameter of a full name."""
    module, _, parameter = name.rpartition(".")
    return module, parameter


def stored_name(name: str, part: str) -> str:
    """Full name of a part: ``a.b.weight`` -> ``a.b.code__weight``."""
    from bitforbit.nn import part_name

    module, parameter = split(name)
    return f"{module}.{part_name(part, parameter)}" if module else part_name(part, parameter)


def spec_of(model: nn.Module, name: str) -> CompressedSpec | None:
    """The spec of the parameter of that full name; None if it is a plain one."""
    from bitforbit.nn import compressed_parameters

    module, parameter = split(name)
    return compressed_parameters(model.get_submodule(module)).get(parameter)


def is_compressed(model: nn.Module, name: str) -> bool:
    """Whether the parameter of that full name is a compressed one."""
    return spec_of(model, name) is not None


def may_compress(model: nn.Module, name: str, options: Options) -> bool:
    """Whether the parameter of that full name is one to be compressed; one that is already counts as such."""
    from bitforbit.nn import compressed_parameters
    from bitforbit.nn.model import left_plain

    module_name, parameter_name = split(name)
    if options.keeps(module_name):
        return False
    module = model.get_submodule(module_name)
    if parameter_name in compressed_parameters(module):
        return True
    parameter = module._parameters.get(parameter_name)
    if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
        return False
    return left_plain(module) is None
