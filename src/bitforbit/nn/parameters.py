"""Compress, install and decompress single parameters of a module, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from bitforbit import tensors
from bitforbit.codecs import registry
from bitforbit.codecs.base import EncodedTensor
from bitforbit.cpu import default_threads
from bitforbit.errors import CompressedParameterError, UnsupportedDtypeError, UsageError
from bitforbit.nn import layout
from bitforbit.nn.classes import Compressed, class_for
from bitforbit.nn.spec import PARTS, CompressedSpec, PlanesSpec, part_name
from bitforbit.nn.values import decode
from bitforbit.ops import MODES

_CODEC = ("planes", 1)


def compressed_parameters(module: nn.Module) -> dict[str, CompressedSpec]:
    """Compressed parameters of this module itself, by name."""
    return dict(module._bitforbit_specs) if isinstance(module, Compressed) else {}


def compress_parameter(module: nn.Module, name: str, *, mode: str = "exact", threads: int | None = None) -> bool:
    """Compress one parameter of the module itself in place; False if it is left plain, since that does not pay.

    Parameters that are shared with other modules are not shared afterwards: compress_model keeps them shared. mode is
    ``"exact"`` or ``"fused"``; threads defaults to ``BITFORBIT_THREADS``, else all CPUs.

    Raises UsageError for a parameter that does not exist or is not in CPU memory, and for an unknown mode.
    """
    plain = module._parameters.get(name)
    if plain is None:
        raise UsageError(f"expected a parameter of {type(module).__name__}, got {name!r}")
    made = compressed(plain, threads)
    if made is None:
        return False
    install_parameter(module, name, *made, mode=mode)
    return True


def compressed(
    tensor: torch.Tensor, threads: int | None = None
) -> tuple[CompressedSpec, Mapping[str, torch.Tensor]] | None:
    """Spec and parts of a tensor in the layout of its device, or None if that would not be smaller."""
    if layout.is_gpu(tensor.device):
        return layout.tiles_on_gpu(tensor) or planes(tensor, threads)
    return planes(tensor, threads)


def planes(tensor: torch.Tensor, threads: int | None = None) -> tuple[PlanesSpec, Mapping[str, torch.Tensor]] | None:
    """Spec and parts of a tensor as planes, on its device, or None if that would not be smaller."""
    if layout.is_gpu(tensor.device):
        return layout.planes_on_gpu(tensor)
    encoded = encode(tensor, threads)
    return None if encoded is None else (PlanesSpec.of_encoded(encoded), torch_parts(encoded))


def encode(tensor: torch.Tensor, threads: int | None = None) -> EncodedTensor | None:
    """The tensor in coded form, or None if that would not be smaller or its dtype is none that is coded."""
    try:
        data, dtype, shape = tensors.to_bytes(tensor)
    except UnsupportedDtypeError:
        return None
    return registry.get(*_CODEC).encode(data, dtype, shape, threads or default_threads()) if data.nbytes else None


def torch_parts(encoded: EncodedTensor) -> dict[str, torch.Tensor]:
    """The parts as tensors over the same memory."""
    return {part: torch.from_numpy(encoded.parts[part]) for part in PARTS}


def install_parameter(
    module: nn.Module, name: str, spec: CompressedSpec, parts: Mapping[str, torch.Tensor], *, mode: str = "exact"
) -> None:
    """Replace a parameter of the module by a compressed one, in place; its class changes to one derived from its own.

    parts are uint8 tensors ``[nbytes]`` by name (``spec.part_names``). They may be on the meta device, to be filled
    later. Parts that are parameters already are used as they are, which ties modules. Raises UsageError for an unknown
    mode or parameter, parts of the wrong dtype or length, or a module that cannot change its class.
    """
    _check(module, name, spec, parts, mode)
    base = module._bitforbit_base if isinstance(module, Compressed) else type(module)
    names = tuple(sorted({*compressed_parameters(module), name}))
    try:
        module.__class__ = class_for(base, names)
    except TypeError as error:
        raise UsageError(f"expected a module of an ordinary class, got {base.__qualname__} ({error})") from None
    specs = module.__dict__.setdefault("_bitforbit_specs", {})
    old = [part_name(part, name) for part in specs[name].part_names] if name in specs else []
    specs[name] = spec
    module.__dict__["_bitforbit_mode"] = mode
    entries = {}
    for part in spec.part_names:
        value = parts[part]
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        entries[part_name(part, name)] = value
    layout.replace_parameters(module, (name, *old, *entries), entries)


def _check(module: nn.Module, name: str, spec: CompressedSpec, parts: Mapping[str, torch.Tensor], mode: str) -> None:
    where = f"{name} of {type(module).__name__}"
    if mode not in MODES:
        raise UsageError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    if name not in module._parameters and name not in compressed_parameters(module):
        raise UsageError(f"expected a parameter of {type(module).__name__}, got {name!r}")
    plain = module._parameters.get(name)
    if plain is not None and tuple(plain.shape) != tuple(spec.shape):
        raise UsageError(f"{where}: expected shape {tuple(plain.shape)}, got {tuple(spec.shape)}")
    if set(parts) != set(spec.part_names):
        raise UsageError(f"{where}: expected parts {', '.join(spec.part_names)}, got {', '.join(parts) or 'none'}")
    for part, value in parts.items():
        if value.dtype != torch.uint8 or value.dim() != 1:
            raise UsageError(f"{where}: expected {part} to be uint8 [nbytes], got {value.dtype} {tuple(value.shape)}")
    sizes = {part: value.numel() for part, value in parts.items()}
    if not spec.fits(sizes):
        raise UsageError(f"{where}: expected parts that fit {spec}, got {sizes} bytes")


def decompress_parameter(module: nn.Module, name: str) -> None:
    """Make a compressed parameter plain again, frozen. With the last one the module gets its plain class back.

    Raises CompressedParameterError if the module has no such compressed parameter, CorruptTensorError.
    """
    if not isinstance(module, Compressed) or name not in module._bitforbit_specs:
        raise CompressedParameterError(f"expected a compressed parameter of {type(module).__name__}, got {name!r}")
    spec, parts = module._bitforbit_specs[name], module._bitforbit_parts(name)
    remove_parameter(module, name, nn.Parameter(decode(spec, parts), requires_grad=False))


def remove_parameter(module: Compressed, name: str, plain: nn.Parameter) -> None:
    """Put a plain parameter in the place of a compressed one."""
    base, parts = module._bitforbit_base, module._bitforbit_specs[name].part_names
    del module._bitforbit_specs[name]
    if module._bitforbit_specs:
        module.__class__ = class_for(base, tuple(sorted(module._bitforbit_specs)))
    else:
        module.__class__ = base
        for attribute in ("_bitforbit_specs", "_bitforbit_mode", "_bitforbit_layout", "_bitforbit_siblings"):
            module.__dict__.pop(attribute, None)
    layout.replace_parameters(module, [part_name(part, name) for part in parts], {name: plain})
