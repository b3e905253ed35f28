"""State dicts and pickles of compressed modules.

A state dict holds the four parts of each compressed parameter in the layout of the files, and its ``_metadata`` their
specs, under ``"bitforbit"``. Parameters in a layout for GPUs are converted, and those parts are in CPU memory. Parts of
other lengths, as other weights have, are loaded too; a plain parameter is compressed on the way in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitforbit import tensors
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.cpu import default_threads
from bitforbit.errors import FormatError
from bitforbit.nn import layout
from bitforbit.nn.spec import PARTS, CompressedSpec, PlanesSpec, part_name

if TYPE_CHECKING:
    from bitforbit.nn.classes import Compressed

METADATA_KEY = "bitforbit"


def write_metadata(destination: Mapping[str, Any], prefix: str, specs: Mapping[str, CompressedSpec]) -> None:
    """Add the specs of a module to the metadata of its state dict."""
    metadata = getattr(destination, "_metadata", None)
    if metadata is not None:
        entry = metadata.setdefault(prefix[:-1], {})
        entry[METADATA_KEY] = {name: spec.to_record() for name, spec in specs.items() if isinstance(spec, PlanesSpec)}


def as_planes(destination: dict[str, Any], before: int, prefix: str, module: Compressed) -> dict[str, CompressedSpec]:
    """Put planes in the place of parts in other layouts, in a state dict that has got the module's own entries.

    The first ``before`` entries are of other modules. Returns the specs of what is in the state dict.
    """
    specs = dict(module._bitforbit_specs)
    private = {name: spec for name, spec in specs.items() if spec.layout != "planes"}
    if not private:
        return specs
    new: dict[str, dict[str, torch.Tensor]] = {}
    for name, spec in private.items():
        specs[name], parts = _saved(spec, module._bitforbit_parts(name))
        entries = {prefix + part_name(part, name): value for part, value in zip(PARTS, parts, strict=True)}
        new |= {prefix + part_name(part, name): entries for part in spec.part_names}
    own = list(destination.items())[before:]
    for key, _ in own:
        del destination[key]
    for key, value in own:
        destination.update(new.get(key, {key: value}))
    return specs


def _planes(spec: CompressedSpec, parts: Sequence[torch.Tensor]) -> layout.Converted:
    made = layout.converted(spec, parts, "planes")
    assert made is not None  # every layout can be planes
    return made


def _saved(spec: CompressedSpec, parts: Sequence[torch.Tensor]) -> tuple[CompressedSpec, tuple[torch.Tensor, ...]]:
    """Spec and parts as planes in CPU memory; the same tensors for tied parameters."""
    known: tuple[CompressedSpec, tuple[torch.Tensor, ...]] | None = layout.recall(spec, parts, "saved")
    if known is None:
        planes, on_device = _planes(spec, parts)
        known = planes, tuple(part.detach().cpu() for part in on_device)
        layout.remember(spec, parts, "saved", known)
    return known


@contextmanager
def raw_state_dicts(model: nn.Module) -> Iterator[None]:
    """Within this context the model's state dicts hold parts as they are: nothing is converted for names only."""
    modules = [module for module in model.modules() if hasattr(module, "_bitforbit_raw_state")]
    for module in modules:
        module.__dict__["_bitforbit_raw_state"] = True
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("_bitforbit_raw_state", None)


def public(module: Compressed) -> dict[str, Any]:
    """What a pickle of the module holds: parameters as planes, on the device that they are on."""
    state = dict(module.__dict__)
    specs = dict(module._bitforbit_specs)
    replaced: dict[str, dict[str, nn.Parameter]] = {}
    for name, spec in module._bitforbit_specs.items():
        parts = module._bitforbit_parts(name)
        if spec.layout == "planes" or parts[0].is_meta:
            continue
        specs[name], planes = _planes(spec, parts)
        entries = {part_name(part, name): value for part, value in zip(PARTS, planes, strict=True)}
        replaced |= {part_name(part, name): entries for part in spec.part_names}
    parameters: dict[str, Any] = {}
    for key, value in module._parameters.items():
        parameters |= replaced.get(key, {key: value})
    return {**state, "_bitforbit_specs": specs, "_parameters": parameters}


def adapt(
    state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], module: Compressed,
    error_msgs: list[str],
) -> tuple[dict[str, Any], dict[str, CompressedSpec]]:  # fmt: skip
    """Make a state dict one that torch can load into the module's parts, whose lengths are changed where they must.

    Returns the state dict and the specs of the parameters that it holds. What does not fit is described in error_msgs.
    """
    adapted, specs = dict(state_dict), dict(module._bitforbit_specs)
    for name, spec in module._bitforbit_specs.items():
        keys = {part: prefix + part_name(part, name) for part in PARTS}
        plain = adapted.pop(prefix + name, None)
        if plain is not None:
            if tuple(plain.shape) != spec.shape:
                error_msgs.append(f"size mismatch for {prefix}{name}: expected {spec.shape}, got {tuple(plain.shape)}.")
                continue
            found, parts = _compressed(plain, spec)
        elif all(key in adapted for key in keys.values()):
            parts = {part: adapted.pop(key) for part, key in keys.items()}
            described, problem = _described(local_metadata, name, spec, parts)
            if described is None:
                error_msgs.append(f"{prefix}{name}: {problem}")
                _keep_own(adapted, prefix, name, module)
                continue
            found = described
        else:
            _keep_own(adapted, prefix, name, module)
            continue
        specs[name], loaded = _fitted(module, name, found, parts)
        for part, value in loaded.items():
            adapted[prefix + part_name(part, name)] = value
            parameter = module._parameters[part_name(part, name)]
            if parameter is not None and parameter.shape != value.shape:
                # In place, so that tied modules see the new length too.
                parameter.data = torch.empty(value.shape, dtype=torch.uint8, device=parameter.device)
    return adapted, specs


def _fitted(
    module: Compressed, name: str, spec: PlanesSpec, parts: Mapping[str, torch.Tensor]
) -> tuple[CompressedSpec, Mapping[str, torch.Tensor]]:
    """Planes in the layout of the module's parameter, which becomes planes if that cannot be."""
    own, device = module._bitforbit_specs[name], module._bitforbit_parts(name)[0].device
    if own.layout == "planes" or device.type == "meta":
        if own.layout != "planes":
            _empty(module, name, spec, parts)
        return spec, parts
    on_device = [parts[part].detach().to(device) for part in PARTS]
    made = layout.converted(spec, on_device, "tiles") if own.layout == "tiles" else None
    if made is None:  # what is loaded does not get smaller, or the parts are shared with other parameters
        _empty(module, name, spec, parts)
        return spec, parts
    other, tiles = made
    return other, {part: value.detach() for part, value in zip(other.part_names, tiles, strict=True)}


def _empty(module: Compressed, name: str, spec: PlanesSpec, parts: Mapping[str, torch.Tensor]) -> None:
    device = module._bitforbit_parts(name)[0].device
    empty = [torch.empty(parts[part].shape, dtype=torch.uint8, device=device) for part in PARTS]
    layout.put(module, name, spec, [nn.Parameter(value, requires_grad=False) for value in empty])


def _keep_own(adapted: dict[str, Any], prefix: str, name: str, module: Compressed) -> None:
    """Let torch copy the module's own parts over themselves: parts of two weights must not be mixed."""
    own = dict(zip(module._bitforbit_specs[name].part_names, module._bitforbit_parts(name), strict=True))
    there = [part for part in PARTS if adapted.pop(prefix + part_name(part, name), None) is not None]
    if set(there) <= set(own):
        adapted |= {prefix + part_name(part, name): own[part] for part in there}


def _described(
    local_metadata: Mapping[str, Any], name: str, own: CompressedSpec, parts: Mapping[str, torch.Tensor]
) -> tuple[PlanesSpec | None, str]:
    """The spec of parts in a state dict, or what is wrong with it."""
    record = local_metadata.get(METADATA_KEY, {}).get(name)
    spec = own
    if record is not None:
        try:
            spec = PlanesSpec.from_record(record)
        except FormatError as error:
            return None, f"its metadata cannot be read: {error}"
    if (spec.dtype, spec.shape) != (own.dtype, own.shape):
        return None, f"expected {own.dtype} of shape {own.shape}, got {spec.dtype} of shape {spec.shape}."
    sizes = {part: value.numel() for part, value in parts.items()}
    well_formed = all(value.dtype == torch.uint8 and value.dim() == 1 for value in parts.values())
    if not well_formed or not isinstance(spec, PlanesSpec) or not spec.fits(sizes):
        reason = "" if record else " and the state dict lacks the metadata (_metadata) that state_dict() writes"
        return None, f"expected uint8 parts that fit {spec}, got lengths {sizes}{reason}."
    return spec, ""


def _compressed(plain: torch.Tensor, own: CompressedSpec) -> tuple[PlanesSpec, dict[str, torch.Tensor]]:
    """A plain tensor as parts: cast to the dtype of the parameter as torch does, coded even if that does not pay."""
    data, dtype, shape = tensors.to_bytes(plain.detach().to("cpu", own.dtype))
    codec, threads = PlanesCodec(), default_threads()
    encoded = codec.encode(data, dtype, shape, threads) or codec.encode_always(data, dtype, shape, dtype, threads)
    return PlanesSpec.of_encoded(encoded), {part: torch.from_numpy(encoded.parts[part]) for part in PARTS}
