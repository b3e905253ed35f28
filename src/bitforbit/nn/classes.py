"""Module classes with compressed parameters.

A compressed parameter ``weight`` is four uint8 parameters ``code__weight``, ``digits__weight``,
``sign_mantissa__weight`` and ``tails__weight`` (on a GPU others, see :mod:`bitforbit.nn.layout`); the attribute
``weight`` is a property that decodes. The class of a converted module is derived from its own class: :class:`Linear`,
:class:`Embedding`, or one made on demand for any other type, whose own ``forward`` runs unchanged.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitforbit.errors import CompressedParameterError
from bitforbit.nn import layout, state
from bitforbit.nn.gpu_specs import TilesSpec
from bitforbit.nn.siblings import Sibling
from bitforbit.nn.spec import CompressedSpec, part_name
from bitforbit.nn.values import Values, decode
from bitforbit.nn.weight import CompressedWeight

_reading = threading.local()
"""Weights decoded for the forwards under way in this thread: ``by_module: {id(module): {name: tensor}}``."""


class Compressed(nn.Module):
    """Base of all modules with compressed parameters."""

    _bitforbit_base: type[nn.Module]
    """The plain class of the module."""
    _bitforbit_names: tuple[str, ...]
    """Names of the compressed parameters."""
    _bitforbit_specs: dict[str, CompressedSpec]
    _bitforbit_mode: str
    _bitforbit_raw_state = False
    """Whether state dicts hold parts as they are: for those who only look for other parameters."""
    _bitforbit_away: Callable[[str], Values] | None = None
    """Where the values of a parameter are whose parts are on the meta device as long as the module does not run."""

    def _bitforbit_parts(self, name: str) -> tuple[torch.Tensor, ...]:
        parameters, names = self._parameters, self._bitforbit_specs[name].part_names
        try:
            return tuple(parameters[part_name(part, name)] for part in names)
        except KeyError:
            raise CompressedParameterError(f"expected the parts of {name} in {type(self).__name__}: {names}") from None

    def _bitforbit_read(self, name: str) -> torch.Tensor:
        spec, parts = self._bitforbit_specs[name], self._bitforbit_parts(name)
        if torch.compiler.is_compiling() or parts[0].is_meta:
            away = None if torch.compiler.is_compiling() else self._bitforbit_away
            return decode(spec, parts) if away is None else CompressedWeight(away(name))
        known = getattr(_reading, "by_module", {}).get(id(self))
        if known is None:
            return CompressedWeight(Values(spec, parts))
        if name not in known:
            # Stacks of experts and tables to look up rarely need decoding as a whole.
            lazy = len(spec.shape) > 2 or isinstance(self, nn.Embedding)
            known[name] = CompressedWeight(Values(spec, parts)) if lazy else decode(spec, parts)
        weight: torch.Tensor = known[name]
        return weight

    def _bitforbit_refuse(self, name: str, value: object) -> None:
        raise CompressedParameterError(
            f"expected {name} of {type(self).__name__} to stay as it is, since it is compressed, got an assignment of "
            f"{type(value).__name__}; use bitforbit.decompress_model first, or load_state_dict"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's. Raises CompressedParameterError for a compressed name."""
        if name in getattr(self, "_bitforbit_names", ()):
            self._bitforbit_refuse(name, param)
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """The module's own, then bits per weight and mode."""
        own, sizes = super().extra_repr(), []
        for name, spec in self._bitforbit_specs.items():
            bits = 8 * sum(part.numel() for part in self._bitforbit_parts(name)) / max(1, spec.coded_elements)
            sizes.append(f"{name}: {bits:.2f} bits/weight" + ("" if spec.layout == "planes" else f" as {spec.layout}"))
        return ", ".join(filter(None, (own, *sizes, f"mode={self._bitforbit_mode!r}")))

    def reset_parameters(self) -> None:
        """Does nothing: compressed weights are what they are."""

    def requires_grad_(self, requires_grad: bool = True) -> Compressed:
        """As nn.Module's. Raises CompressedParameterError for True: compressed parameters are frozen."""
        if requires_grad:
            raise CompressedParameterError(
                f"expected the compressed parameters of {type(self).__name__} to stay frozen; train adapters "
                "(LoRA), or use bitforbit.decompress_model first"
            )
        super().requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Compressed:
        """As nn.Module's, which moves and casts; what moves to a GPU or away from it changes its layout.

        Raises CompressedParameterError for a cast to another dtype.
        """
        left = []
        for name, spec in self._bitforbit_specs.items():
            device = self._bitforbit_parts(name)[0].device
            probe = fn(torch.empty(0, dtype=spec.dtype, device=device))
            if probe.dtype != spec.dtype:
                raise CompressedParameterError(
                    f"expected {name} of {type(self).__name__} to stay {spec.dtype}, since it is compressed, got a "
                    f"cast to {probe.dtype}; use bitforbit.decompress_model, cast, then compress again"
                )
            if spec.layout != "planes" and layout.leaves_gpu(device, probe.device):
                left.append(name)
        for name in left:
            layout.convert(self, name, "planes")
        super()._apply(fn, recurse)
        layout.settle(self)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        before = len(destination)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        specs = self._bitforbit_specs
        if not keep_vars and not self._bitforbit_raw_state:
            specs = state.as_planes(destination, before, prefix, self)
        state.write_metadata(destination, prefix, specs)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        adapted, specs = state.adapt(state_dict, prefix, local_metadata, self, error_msgs)
        missing: list[str] = []
        super()._load_from_state_dict(adapted, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += state.public_names(missing, state_dict, prefix, self)
        self._bitforbit_specs.update(specs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made on demand have no importable name.
        return _new, (self._bitforbit_base, self._bitforbit_names), state.public(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        # As copy.deepcopy does it, but with the layout that the parameters have.
        copied = memo[id(self)] = _new(self._bitforbit_base, self._bitforbit_names)
        copied.__setstate__(copy.deepcopy(dict(self.__dict__), memo))
        return copied


class Linear(Compressed, nn.Linear):
    """``nn.Linear`` with a compressed weight ``[out_features, in_features]``. Made by converting an nn.Linear."""

    _bitforbit_base = nn.Linear
    _bitforbit_names = ("weight",)
    _bitforbit_siblings: Sibling | None = None
    """Its place among the linears that it may be multiplied together with."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, from the compressed weight."""
        # Written for little overhead: self.bias takes as long as all of this.
        p = self._parameters
        bias = p["bias"] if "bias" in p else self.bias  # noqa: SIM401
        spec, mode = self._bitforbit_specs["weight"], self._bitforbit_mode
        if mode == "fused" and isinstance(spec, TilesSpec):
            siblings = self._bitforbit_siblings
            if siblings is not None:
                return siblings.linear(input, spec, p, bias)
        return spec.linear(input, p, bias, mode)


class Embedding(Compressed, nn.Embedding):
    """``nn.Embedding`` with a compressed weight; only the rows asked for are decoded. Made by converting one."""

    _bitforbit_base = nn.Embedding
    _bitforbit_names = ("weight",)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[...]`` to ``[..., embedding_dim]``."""
        return self._bitforbit_specs["weight"].embedding(input, self._bitforbit_parts("weight"))


@contextmanager
def _forward_of(module: nn.Module) -> Iterator[None]:
    """Keep each weight of the module that is read, until the outermost forward of this module returns."""
    by_module = _reading.__dict__.setdefault("by_module", {})
    outermost = id(module) not in by_module
    if outermost:
        by_module[id(module)] = {}
    try:
        yield
    finally:
        if outermost:
            del by_module[id(module)]


def _generic_forward(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        with _forward_of(self):
            return base.forward(self, *args, **kwargs)

    return forward


def _weight_property(name: str) -> property:
    def read(self: Compressed) -> torch.Tensor:
        return self._bitforbit_read(name)

    def assign(self: Compressed, value: object) -> None:
        if isinstance(value, CompressedWeight) and value.spec.shape == self._bitforbit_specs[name].shape:
            # The weight of another compressed module: libraries tie weights by such an assignment.
            layout.put(self, name, value.spec, value.parts)
        else:
            self._bitforbit_refuse(name, value)

    return property(read, assign, doc=f"The decoded {name}, read only.")


for _cls in (Linear, Embedding):
    _cls.weight = _weight_property("weight")


def fits_linear(base: type[nn.Module]) -> bool:
    """Whether modules of this class compute what nn.Linear computes."""
    return issubclass(base, nn.Linear) and base.forward is nn.Linear.forward


def fits_embedding(base: type[nn.Module]) -> bool:
    """Whether modules of this class compute what nn.Embedding computes."""
    return issubclass(base, nn.Embedding) and base.forward is nn.Embedding.forward


_made: dict[tuple[Any, tuple[str, ...]], type[Compressed]] = {}


def class_for(base: type[nn.Module], names: tuple[str, ...]) -> type[Compressed]:
    """The class of modules of plain class ``base`` whose parameters ``names`` (sorted) are compressed."""
    made = _made.get((base, names))
    return made if made is not None else _made.setdefault((base, names), _make(base, names))


def _make(base: type[nn.Module], names: tuple[str, ...]) -> type[Compressed]:
    for ours in (Linear, Embedding):
        if (base, names) == (ours._bitforbit_base, ours._bitforbit_names):
            return ours
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_bitforbit_base": base,
        "_bitforbit_names": names,
        # Calling it makes a plain module: PEFT makes the halves of an adapter from the class of a convolution.
        "__new__": lambda cls, *args, **kwargs: base(*args, **kwargs),
        **{name: _weight_property(name) for name in names},
    }
    first: type[Compressed] = Compressed
    if "weight" in names and fits_linear(base):
        first = Linear
    elif "weight" in names and fits_embedding(base):
        first = Embedding
    else:
        body["forward"] = _generic_forward(base)
    bases = (first,) if base is first.__dict__.get("_bitforbit_base") else (first, base)
    made: type[Compressed] = types.new_class(base.__name__, bases, exec_body=lambda space: space.update(body))
    return made


def _new(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = class_for(base, names)
    module: nn.Module = nn.Module.__new__(cls)
    return module
