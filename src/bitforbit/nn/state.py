"""State dicts of compressed modules.

A state dict holds the four parts of each compressed parameter as they are, and its ``_metadata`` their specs, under
``"bitforbit"``. Parts of other lengths, as other weights have, are loaded too; a plain parameter is compressed on
the way in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bitforbit import tensors
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.cpu import default_threads
from bitforbit.errors import FormatError
from bitforbit.nn.spec import PARTS, CompressedSpec, part_name

METADATA_KEY = "bitforbit"


def write_metadata(destination: Mapping[str, Any], prefix: str, specs: Mapping[str, CompressedSpec]) -> None:
    """Add the specs of a module to the metadata of its state dict."""
    metadata = getattr(destination, "_metadata", None)
    if metadata is not None:
        entry = metadata.setdefault(prefix[:-1], {})
        entry[METADATA_KEY] = {name: spec.to_record() for name, spec in specs.items()}


def adapt(
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    own: Mapping[str, CompressedSpec],
    parameters: Mapping[str, torch.Tensor],
    error_msgs: list[str],
) -> tuple[dict[str, Any], dict[str, CompressedSpec]]:
    """Make a state dict one that torch can load into the module's parts, whose lengths are changed where they must.

    Returns the state dict and the specs of the parameters that it holds. What does not fit is described in error_msgs.
    """
    adapted, specs = dict(state_dict), dict(own)
    for name, spec in own.items():
        keys = {part: prefix + part_name(part, name) for part in PARTS}
        plain = adapted.pop(prefix + name, None)
        if plain is not None:
            if tuple(plain.shape) != spec.shape:
                error_msgs.append(f"size mismatch for {prefix}{name}: expected {spec.shape}, got {tuple(plain.shape)}.")
                continue
            parts, specs[name] = _compressed(plain, spec)
            adapted.update({keys[part]: value for part, value in parts.items()})
        elif all(key in adapted for key in keys.values()):
            parts = {part: adapted[key] for part, key in keys.items()}
            found, problem = _described(local_metadata, name, spec, parts)
            if problem:
                error_msgs.append(f"{prefix}{name}: {problem}")
                _keep_own(adapted, keys, name, parameters)
                continue
            specs[name] = found
        else:
            _keep_own(adapted, keys, name, parameters)
            continue
        for part, value in parts.items():
            parameter = parameters[part_name(part, name)]
            if parameter.shape != value.shape:
                # In place, so that tied modules see the new length too.
                parameter.data = torch.empty(value.shape, dtype=torch.uint8, device=parameter.device)
    return adapted, specs


def _keep_own(
    adapted: dict[str, Any], keys: Mapping[str, str], name: str, parameters: Mapping[str, torch.Tensor]
) -> None:
    """Let torch copy the module's own parts over themselves: parts of two weights must not be mixed."""
    for part, key in keys.items():
        if key in adapted:
            adapted[key] = parameters[part_name(part, name)]


def _described(
    local_metadata: Mapping[str, Any], name: str, own: CompressedSpec, parts: Mapping[str, torch.Tensor]
) -> tuple[CompressedSpec, str]:
    """The spec of parts in a state dict, and what is wrong with it ("" if nothing is)."""
    record = local_metadata.get(METADATA_KEY, {}).get(name)
    spec = own
    if record is not None:
        try:
            spec = CompressedSpec.from_record(record)
        except FormatError as error:
            return own, f"its metadata cannot be read: {error}"
    if (spec.dtype, spec.shape) != (own.dtype, own.shape):
        return own, f"expected {own.dtype} of shape {own.shape}, got {spec.dtype} of shape {spec.shape}."
    sizes = {part: value.numel() for part, value in parts.items()}
    if any(value.dtype != torch.uint8 or value.dim() != 1 for value in parts.values()) or not spec.fits(sizes):
        reason = "" if record else " and the state dict lacks the metadata (_metadata) that state_dict() writes"
        return own, f"expected uint8 parts that fit {spec}, got lengths {sizes}{reason}."
    return spec, ""


def _compressed(plain: torch.Tensor, own: CompressedSpec) -> tuple[dict[str, torch.Tensor], CompressedSpec]:
    """A plain tensor as parts: cast to the dtype of the parameter as torch does, coded even if that does not pay."""
    data, dtype, shape = tensors.to_bytes(plain.detach().to("cpu", own.dtype))
    codec, threads = PlanesCodec(), default_threads()
    encoded = codec.encode(data, dtype, shape, threads) or codec.encode_always(data, dtype, shape, dtype, threads)
    return {part: torch.from_numpy(encoded.parts[part]) for part in PARTS}, CompressedSpec.of_encoded(encoded)
