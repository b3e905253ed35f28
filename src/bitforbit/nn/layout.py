"""Layouts of compressed parameters in memory, and their conversion in place.

A parameter is ``planes`` in CPU memory. On a GPU one in BF16, FP16 or FP8 (E4M3) becomes ``tiles``, converted there
matrix by matrix; other dtypes stay ``planes``, as does what tiles would not make smaller. ``df11`` parameters come from
DFloat11 checkpoints only. Whatever leaves the process or the GPU is converted back to ``planes``, to the bytes that the
files have.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from bitforbit.codecs.planes import PlanesCodec
from bitforbit.codecs.planes.layout import matrix_view
from bitforbit.cpu import default_threads
from bitforbit.errors import UsageError
from bitforbit.nn.gpu_specs import TILES_KINDS, TilesSpec
from bitforbit.nn.spec import PARTS, CompressedSpec, PlanesSpec, part_name

if TYPE_CHECKING:
    from bitforbit.nn.classes import Compressed

LAYOUTS = ("auto", "planes", "tiles")
"""What parameters can be converted to; ``"auto"``: tiles on a GPU, planes elsewhere."""

Converted = tuple[CompressedSpec, tuple[nn.Parameter, ...]]


def is_gpu(device: torch.device) -> bool:
    """Whether parameters on this device are to be in a layout for GPUs."""
    return bool(device.type == "cuda")


def leaves_gpu(before: torch.device, after: torch.device) -> bool:
    """Whether a move takes parameters to where their layout is none. Without data there is nothing to convert."""
    return before != after and "meta" not in (before.type, after.type) and not is_gpu(after)


def check(layout: str) -> None:
    """Raise UsageError for a layout that there is not."""
    if layout not in LAYOUTS:
        raise UsageError(f"expected a layout among {', '.join(LAYOUTS)}, got {layout!r}")


def choose(module: Compressed, layout: str) -> None:
    """Convert the parameters of one module, as far as they can be, and remember the choice for later moves."""
    if layout == "planes":
        module.__dict__["_bitforbit_layout"] = layout
    else:
        module.__dict__.pop("_bitforbit_layout", None)
    for name, spec in module._bitforbit_specs.items():
        part = module._bitforbit_parts(name)[0]
        if part.is_meta:  # offloaded: these stay as they are stored
            continue
        if layout != "auto":
            convert(module, name, layout)
        elif not is_gpu(part.device):
            convert(module, name, "planes")
        elif spec.layout == "planes":
            convert(module, name, "tiles")


def settle(module: Compressed) -> None:
    """Convert what has come to a GPU, if no other layout was chosen."""
    chosen = module.__dict__.get("_bitforbit_layout")
    for name, spec in module._bitforbit_specs.items():
        part = module._bitforbit_parts(name)[0]
        if chosen is None and spec.layout == "planes" and not part.is_meta and is_gpu(part.device):
            convert(module, name, "tiles")


def convert(module: Compressed, name: str, layout: str) -> bool:
    """Convert one parameter in place; False if it stays as it is, since that layout is none for it.

    Parameters that share their parts before share them afterwards. At most this parameter is in memory twice, or once
    in BF16. Raises UsageError for parts that are not on a GPU.
    """
    spec = module._bitforbit_specs[name]
    if spec.layout == layout:
        return True
    result = converted(spec, module._bitforbit_parts(name), layout)
    if result is None:
        return False
    put(module, name, *result)
    return True


def put(module: Compressed, name: str, spec: CompressedSpec, parts: Sequence[nn.Parameter]) -> None:
    """Give a compressed parameter of the module another spec and other parts."""
    old = [part_name(part, name) for part in module._bitforbit_specs[name].part_names]
    module._bitforbit_specs[name] = spec
    new = {part_name(part, name): value for part, value in zip(spec.part_names, parts, strict=True)}
    replace_parameters(module, old, new)


def replace_parameters(module: nn.Module, old: Collection[str], new: Mapping[str, nn.Parameter]) -> None:
    """Put parameters in the place of others: optimizers and state dicts go by the order."""
    entries = list(module._parameters.items())
    module._parameters.clear()
    for name, value in entries:
        if name in old:
            module._parameters.update(new)
        else:
            module._parameters[name] = value
    module._parameters.update(new)


# --- what a parameter is in another layout --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Twin:
    """A conversion that was made: of parts in this state, to these parts, if they are still in use."""

    state: tuple[Any, ...]
    spec: CompressedSpec
    parts: tuple[weakref.ref[torch.Tensor], ...]


_twins: Any = WeakTensorKeyDictionary()
"""First part -> spec and use -> twin: modules that are tied are converted one after the other."""


def converted(spec: CompressedSpec, parts: Sequence[torch.Tensor], layout: str) -> Converted | None:
    """Spec and parts of a parameter in another layout, on the same device; None if that layout is none for it.

    Asked again while the result is in use, it gives the same parts. Raises UsageError for parts that are not on a GPU.
    """
    twin: Converted | None = recall(spec, parts, layout)
    if twin is not None:
        return twin
    with torch.no_grad():
        made = _to_tiles(spec, parts) if layout == "tiles" else _to_planes(spec, parts)
    if made is None:
        return None
    other, tensors = made
    fresh = tuple(nn.Parameter(tensors[part], requires_grad=False) for part in other.part_names)
    remember(spec, parts, layout, (other, fresh))
    return other, fresh


def recall(spec: CompressedSpec, parts: Sequence[torch.Tensor], use: str) -> Any:
    """What was remembered for a parameter and a use of it, if it is still in use and the parameter has not changed."""
    twin = _twins.get(parts[0], {}).get((spec, use))
    if twin is None or twin.state != _state(parts):
        return None
    found = tuple(part() for part in twin.parts)
    return None if any(part is None for part in found) else (twin.spec, found)


def remember(
    spec: CompressedSpec, parts: Sequence[torch.Tensor], use: str, made: tuple[CompressedSpec, Sequence[torch.Tensor]]
) -> None:
    """Note what a parameter is in another form, without keeping that in memory: tied parameters ask for it again."""
    twin = _Twin(_state(parts), made[0], tuple(map(weakref.ref, made[1])))
    _twins.setdefault(parts[0], {})[spec, use] = twin


def _state(parts: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Changes when a part is written to or gets other memory."""
    return tuple((part.data_ptr(), None if part.is_inference() else part._version) for part in parts)


def _to_tiles(
    spec: CompressedSpec, parts: Sequence[torch.Tensor]
) -> tuple[TilesSpec, Mapping[str, torch.Tensor]] | None:
    from bitforbit.ops import gpu

    if spec.dtype not in TILES_KINDS:
        return None
    rows, cols = spec.matrix_shape()
    if isinstance(spec, PlanesSpec):
        tensors = gpu.planes_to_tiles(tuple(parts), *spec.arguments)
    else:
        tensors = gpu.pack_tiles(spec.decode(parts, 0, rows))
    return None if tensors is None else (TilesSpec(spec.dtype, spec.shape, rows, cols), tensors)


def _to_planes(spec: CompressedSpec, parts: Sequence[torch.Tensor]) -> tuple[PlanesSpec, Mapping[str, torch.Tensor]]:
    from bitforbit.ops import gpu

    rows, cols = spec.matrix_shape()
    if isinstance(spec, TilesSpec):
        rows_per_table, tensors = gpu.tiles_to_planes(tuple(parts), rows, cols, spec.kind)
        return PlanesSpec(spec.dtype, spec.shape, spec.kind, rows, cols, rows_per_table), tensors
    return planes_of(spec.decode(parts, 0, rows).view(spec.shape))


# --- what a plain tensor is in a layout -----------------------------------------------------------------------------


def planes_of(tensor: torch.Tensor) -> tuple[PlanesSpec, Mapping[str, torch.Tensor]]:
    """A plain tensor as planes on its device, even where that does not make it smaller."""
    made = planes_on_gpu(tensor)
    if made is not None:
        return made
    from bitforbit import tensors

    data, dtype, shape = tensors.to_bytes(tensor.detach().cpu())
    encoded = PlanesCodec().encode_always(data, dtype, shape, dtype, default_threads())
    parts = {part: torch.from_numpy(encoded.parts[part]).to(tensor.device) for part in PARTS}
    return PlanesSpec.of_encoded(encoded), parts


def planes_on_gpu(tensor: torch.Tensor) -> tuple[PlanesSpec, Mapping[str, torch.Tensor]] | None:
    """A plain tensor in GPU memory as planes; None if that does not make it smaller."""
    from bitforbit.ops import gpu

    encoded = gpu.encode_planes(tensor)
    return None if encoded is None else (PlanesSpec.of_encoded(encoded), encoded.parts)


def tiles_on_gpu(tensor: torch.Tensor) -> tuple[TilesSpec, Mapping[str, torch.Tensor]] | None:
    """A plain tensor in GPU memory as tiles; None if there are none of its dtype, or it would not get smaller."""
    from bitforbit.ops import gpu

    if tensor.dtype not in TILES_KINDS or tensor.numel() == 0:
        return None
    shape = tuple(tensor.shape)
    rows, cols = matrix_view(shape)
    parts = gpu.pack_tiles(tensor.detach().reshape(rows, cols))
    return None if parts is None else (TilesSpec(tensor.dtype, shape, rows, cols), parts)
