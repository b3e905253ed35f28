"""The modules of a block: their parameters at rest, on the meta device, and as views into an image while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from bitforbit.errors import StreamedModelError, UsageError
from bitforbit.nn import compressed_parameters, layout, part_name
from bitforbit.nn.spec import CompressedSpec
from bitforbit.nn.values import Values
from bitforbit.offload.image import FileRange, Image, Key
from bitforbit.offload.stores import Store

Stored: TypeAlias = torch.Tensor | FileRange
"""A tensor in host memory, or where its bytes lie."""


class AwayValues(Values):
    """Values of a streamed parameter that is asked for while its block does not run: read then."""

    def __init__(self, spec: CompressedSpec, device: torch.device, read: Callable[[], Sequence[torch.Tensor]]) -> None:
        """``read`` gives the parts at rest, in CPU memory."""
        self._parts: tuple[torch.Tensor, ...] = ()
        self._device = device
        self._read = read
        super().__init__(spec, ())

    @property
    def device(self) -> torch.device:
        """The one that computes."""
        return self._device

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """On that device."""
        if not self._parts:
            self._parts = tuple(part.to(self._device) for part in self._read())
        return self._parts

    @parts.setter
    def parts(self, value: tuple[torch.Tensor, ...]) -> None:
        self._parts = value


class Found(NamedTuple):
    """A tensor to be streamed: where it is, and its dtype and shape."""

    value: Stored
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class Member:
    """One module of a block."""

    module: nn.Module
    keys: list[Key] = field(default_factory=list)
    """Its parameters that are streamed, under the names that they have while it runs."""
    specs: dict[str, CompressedSpec] = field(default_factory=dict)
    """Specs that it has only while it runs: of parameters that are in another layout then."""
    replaced: frozenset[str] = frozenset()
    """Names of parameters that it has at rest only."""
    at_rest: tuple[Any, Any] | None = None
    """Its parameters and specs at rest, while it runs."""

    def install(self, memory: torch.Tensor, image: Image) -> None:
        """Views into an image for its streamed parameters; the others as they are."""
        own = self.module.__dict__
        parameters = {name: value for name, value in own["_parameters"].items() if name not in self.replaced}
        for key in self.keys:
            parameters[key.name] = nn.Parameter(image.pieces[key].view(memory), requires_grad=False)
        self.at_rest = own["_parameters"], own.get("_bitforbit_specs")
        own["_parameters"] = parameters
        if self.specs:
            own["_bitforbit_specs"] = {**own["_bitforbit_specs"], **self.specs}

    def remove(self) -> None:
        """Undo :meth:`install`."""
        assert self.at_rest is not None
        own = self.module.__dict__
        own["_parameters"], specs = self.at_rest
        if self.specs:
            own["_bitforbit_specs"] = specs
        self.at_rest = None


class Block:
    """A module whose frozen parameters are streamed. Those that require gradients stay on the device, as do buffers."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.members = [Member(each) for each in dict.fromkeys(module.modules())]
        self.image = Image({}, 0)
        self._paths = {id(each): path for path, each in module.named_modules()}
        self._running = 0

    # --- made once ------------------------------------------------------------------------------------------------

    def collect(self, stored: Mapping[str, Stored], device: torch.device, in_tiles: bool) -> dict[Key, Found]:
        """The tensors to be streamed, as they are to lie in the image.

        ``in_tiles``: compressed ones in host memory are converted to tiles, on the device, as far as they can be.
        ``stored`` goes by full names. Raises UsageError for tensors that are nowhere.
        """
        found: dict[Key, Found] = {}
        for number, member in enumerate(self.members):
            module, prefix = member.module, self.path(member)
            in_parts: set[str] = set()
            replaced: set[str] = set()
            for name, spec in compressed_parameters(module).items():
                parts = [part_name(part, name) for part in spec.part_names]
                values = [_value(module, prefix, part, stored) for part in parts]
                in_parts |= {*parts}
                if spec.layout == "df11":
                    raise UsageError(f"{prefix}.{name}: parameters in the layout of DFloat11 cannot be streamed")
                made = _in_tiles(module, spec, values, device) if in_tiles else None
                if made is not None:
                    member.specs[name], values = made
                    replaced |= {*parts}
                    parts = [part_name(part, name) for part in member.specs[name].part_names]
                for part, value in zip(parts, values, strict=True):
                    nbytes = value.numel() if isinstance(value, torch.Tensor) else value.nbytes
                    found[Key(number, part)] = Found(value, torch.uint8, (nbytes,))
            member.replaced = frozenset(replaced)
            for name, parameter in module._parameters.items():
                if parameter is None or name in in_parts or (parameter.requires_grad and not parameter.is_meta):
                    continue
                value = _value(module, prefix, name, stored)
                found[Key(number, name)] = Found(value, parameter.dtype, (*parameter.shape,))
        return found

    def rest(self, image: Image, device: torch.device) -> None:
        """Take the parameters of an image out of the modules, and what stays to the device."""
        self.image = image
        for key in image.pieces:
            self.members[key.module].keys.append(key)
        for member in self.members:
            parameters = member.module._parameters
            away = {key.name for key in member.keys} | member.replaced
            for name, parameter in parameters.items():
                if parameter is None:
                    continue
                if name not in away:
                    parameter.data = parameter.data.to(device)
                elif parameter.is_meta:
                    parameter.requires_grad_(False)
                else:
                    parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            for name, buffer in member.module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    member.module._buffers[name] = buffer.to(device)

    def tell(self, store: Store, device: torch.device) -> None:
        """Let compressed parameters be read while the block does not run: adapters ask for a weight's device, too."""
        for number, member in enumerate(self.members):
            if compressed_parameters(member.module):
                away = functools.partial(self.values, member, number, store, device)
                member.module.__dict__["_bitforbit_away"] = away

    def values(self, member: Member, number: int, store: Store, device: torch.device, own: str) -> Values:
        """A compressed parameter of a module, to be read when its values are asked for."""
        spec = compressed_parameters(member.module)[own]
        names = [part_name(part, own) for part in spec.part_names]

        def read() -> list[torch.Tensor]:
            return [self.tensor(member, number, name, store, device) for name in names]

        return AwayValues(spec, device, read)

    def forget(self) -> None:
        """Undo :meth:`tell`."""
        for member in self.members:
            member.module.__dict__.pop("_bitforbit_away", None)

    # --- whenever it runs -----------------------------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        """Whether a forward is under way."""
        return self._running > 0

    def install(self, image: torch.Tensor) -> None:
        """Give the modules their parameters, as views into the image.

        Fresh ones every time: whatever others remember of parameters they remember of an object, and of its state.
        """
        self._running += 1
        # Views of inference mode would not tell of later changes.
        with torch.inference_mode(False), torch.no_grad():
            for member in self.members:
                if member.keys:
                    member.install(image, self.image)

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self._running -= 1
        for member in self.members:
            if member.at_rest is not None:
                member.remove()

    def trains(self) -> bool:
        """Whether anything in it requires gradients. Raises StreamedModelError if that is a streamed parameter."""
        for member in self.members:
            for key in member.keys:
                parameter = member.module._parameters.get(key.name)
                if parameter is not None and parameter.requires_grad:
                    raise StreamedModelError(
                        f"expected the streamed parameters of block {self.name!r} to be frozen, got {key.name} of "
                        f"{self.path(member)} to be trained; train adapters, or keep the block on the device"
                    )
        return any(parameter.requires_grad for parameter in self.module.parameters())

    # --- what is not running --------------------------------------------------------------------------------------

    def path(self, member: Member) -> str:
        """Full name of a module of the block."""
        return ".".join(filter(None, (self.name, self._paths[id(member.module)])))

    def names(self) -> dict[str, tuple[Member, int, str]]:
        """The streamed parameters at rest, by name relative to the block: module, its number, own name."""
        found = {}
        for number, member in enumerate(self.members):
            path = self._paths[id(member.module)]
            for name in member.module._parameters:
                if Key(number, name) in self.image.pieces or name in member.replaced:
                    found[f"{path}.{name}" if path else name] = member, number, name
        return found

    def tensor(self, member: Member, number: int, name: str, store: Store, device: torch.device) -> torch.Tensor:
        """A streamed parameter as it is at rest (planes, not tiles), in host memory. Raises BlockReadError."""
        if name not in member.replaced:
            return store.tensor(Key(number, name))
        for own, tiles in member.specs.items():
            at_rest = compressed_parameters(member.module)[own]
            names = [part_name(part, own) for part in at_rest.part_names]
            if name not in names:
                continue
            keys = [Key(number, part_name(part, own)) for part in tiles.part_names]
            made = layout.converted(tiles, [store.tensor(key).to(device) for key in keys], "planes")
            if made is None or made[0] != at_rest:
                raise StreamedModelError(
                    f"{self.path(member)}.{own}: expected the planes that it was loaded from, got {made and made[0]}; "
                    "load the model without streaming"
                )
            return made[1][names.index(name)].detach().cpu()
        raise AssertionError(name)


def _value(module: nn.Module, prefix: str, name: str, stored: Mapping[str, Stored]) -> Stored:
    value = stored.get(f"{prefix}.{name}")
    if value is not None:
        return value
    parameter = module._parameters[name]
    if parameter is None or parameter.is_meta:
        raise UsageError(f"expected {prefix}.{name} to be in memory, or to be told where it is stored, got neither")
    return parameter.detach().cpu()


def _in_tiles(
    module: nn.Module, spec: CompressedSpec, values: list[Stored], device: torch.device
) -> tuple[CompressedSpec, list[Stored]] | None:
    """A parameter in tiles, converted on the device; None if it is in files, or is to stay as it is."""
    if spec.layout != "planes" or module.__dict__.get("_bitforbit_layout") is not None:
        return None
    tensors = [value.to(device) for value in values if isinstance(value, torch.Tensor)]
    made = layout.converted(spec, tensors, "tiles") if len(tensors) == len(values) else None
    return None if made is None else (made[0], [part.detach() for part in made[1]])
