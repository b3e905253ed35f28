"""The tensor that ``module.weight`` gives for a compressed weight: decoded when its values are needed, not before.

Models often ask a weight for its dtype or device only, index one expert out of a stack, or look rows up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

from bitforbit import ops
from bitforbit.errors import CompressedParameterError

if TYPE_CHECKING:
    from bitforbit.nn.spec import CompressedSpec

_READ_ONLY = (
    "expected a compressed weight to be read only, got {}; decompress the module first "
    "(bitforbit.decompress_model) and compress it again afterwards"
)


def decode(spec: CompressedSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """A fresh plain tensor of ``spec.shape``."""
    return ops.decode(*parts, *spec.arguments, 0, spec.rows).view(spec.shape)


class CompressedWeight(torch.Tensor):
    """A read-only tensor over the parts of a compressed parameter.

    Every operation sees the decoded values and gives plain tensors. An index into the first of three or more
    dimensions decodes that slice alone; ``F.embedding`` decodes the rows looked up. Changing it in place raises
    CompressedParameterError: the change would be lost.
    """

    spec: CompressedSpec
    parts: tuple[torch.Tensor, ...]
    _decoded: torch.Tensor | None

    # Operations are intercepted below autograd (__torch_dispatch__), so that code which looks for overridden functions
    # takes the same path as with a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, spec: CompressedSpec, parts: Sequence[torch.Tensor]) -> CompressedWeight:
        """For modules: spec and parts must fit each other."""
        weight: CompressedWeight = torch.Tensor._make_wrapper_subclass(
            cls, spec.shape, dtype=spec.dtype, device=parts[0].device
        )
        weight.spec = spec
        weight.parts = tuple(parts)
        weight._decoded = None
        # transformers fills weights that lack this mark with random numbers when it initializes a module.
        weight._is_hf_initialized = True
        return weight

    def decoded(self) -> torch.Tensor:
        """The plain tensor, decoded on the first call."""
        if self._decoded is None:
            self._decoded = decode(self.spec, self.parts)
        return self._decoded

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, value in (*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)):
            info = argument.alias_info
            if isinstance(value, CompressedWeight) and info is not None and info.is_write:
                raise CompressedParameterError(_READ_ONLY.format(func.name()))
        special = _SPECIAL.get(func)
        if special is not None and isinstance(args[0], CompressedWeight) and args[0]._decoded is None:
            result = special(*args, **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(CompressedWeight, CompressedWeight.decoded, (args, dict(kwargs)))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        """The plain tensor."""
        return self.decoded()

    @data.setter
    def data(self, value: object) -> NoReturn:
        raise CompressedParameterError(_READ_ONLY.format("an assignment to .data"))

    def __setitem__(self, index: object, value: object) -> NoReturn:
        raise CompressedParameterError(_READ_ONLY.format("an assignment to some of its elements"))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"CompressedWeight({self.decoded()!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decoded().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.decoded().clone()


def _named(func: Any, kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]


def _select(weight: CompressedWeight, dim: int, index: int) -> torch.Tensor | None:
    spec = weight.spec
    if len(spec.shape) < 3 or dim not in (0, -len(spec.shape)) or spec.rows % spec.shape[0]:
        return None
    rows = spec.rows // spec.shape[0]
    begin = (index + spec.shape[0] if index < 0 else index) * rows
    return ops.decode(*weight.parts, *spec.arguments, begin, begin + rows).view(spec.shape[1:])


def _embedding(weight: CompressedWeight, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    spec = weight.spec
    if (spec.rows, spec.cols) != spec.shape:
        return None
    return ops.embedding(ids, *weight.parts, *spec.arguments)


_SPECIAL: dict[Any, Callable[..., torch.Tensor | None]] = {
    torch.ops.aten.select.int: _select,
    torch.ops.aten.embedding.default: _embedding,
}


def _on_decoded(name: str) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def call(self: CompressedWeight, *args: Any, **kwargs: Any) -> Any:
        return method(self.decoded(), *args, **kwargs)

    return call


# These reach for the memory of a tensor, which this one does not have.
for _name in (
    *("__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage", "share_memory_"),
    *("is_shared", "storage_type"),
):
    setattr(CompressedWeight, _name, _on_decoded(_name))
