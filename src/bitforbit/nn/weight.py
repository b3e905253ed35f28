"""The tensor that ``module.weight`` gives for a compressed weight: decoded when its values are needed, not before.

Models often ask a weight for its dtype or device only, multiply by a few experts out of a stack, or look rows up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

from bitforbit.errors import CompressedParameterError
from bitforbit.nn.values import Values

if TYPE_CHECKING:
    from bitforbit.nn.spec import CompressedSpec

_READ_ONLY = (
    "expected a compressed weight to be read only, got {}; decompress the module first "
    "(bitforbit.decompress_model) and compress it again afterwards"
)


class CompressedWeight(torch.Tensor):
    """A read-only tensor over the parts of a compressed parameter.

    Every operation sees the decoded values and gives plain tensors. Of a stack of matrices (three or more dimensions),
    indices into the first dimension and grouped products decode only the matrices they need; ``F.embedding`` decodes
    the rows looked up. Changing it in place raises CompressedParameterError: the change would be lost.
    """

    values: Values
    transposed: bool
    """Whether the last two dimensions are swapped."""

    # Operations are intercepted below autograd (__torch_dispatch__), so that code which looks for overridden functions
    # takes the same path as with a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Values, transposed: bool = False) -> CompressedWeight:
        """For modules and for itself."""
        spec = values.spec
        like = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        if transposed:
            like = like.mT
        weight: CompressedWeight = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=spec.dtype, device=values.device
        )
        weight.values = values
        weight.transposed = transposed
        # transformers fills weights that lack this mark with random numbers when it initializes a module.
        weight._is_hf_initialized = True
        return weight

    @property
    def spec(self) -> CompressedSpec:
        """What describes the parameter."""
        return self.values.spec

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The parts of the parameter."""
        return self.values.parts

    def decoded(self) -> torch.Tensor:
        """The plain tensor, decoded on the first call."""
        return self._oriented(self.values.whole())

    def slices(self, wanted: Sequence[int]) -> torch.Tensor:
        """A plain tensor in which only these slices of the first dimension need be valid."""
        return self._oriented(self.values.slices(wanted))

    def _oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mT if self.transposed else tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        _refuse_writes(func, args, kwargs)
        special = _SPECIAL.get(func)
        if special is not None:
            result = special(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(CompressedWeight, CompressedWeight.decoded, (args, kwargs))
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


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    schema = func._schema
    if not schema.is_mutable:
        return
    for position, argument in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(value, CompressedWeight) and argument.alias_info is not None and argument.alias_info.is_write:
            raise CompressedParameterError(_READ_ONLY.format(func.name()))


# --- operations that need not decode everything: (func, *args) -> result, or NotImplemented -------------------------


def _select(func: Any, weight: Any, dim: int, index: int) -> Any:
    if not _is_stack(weight) or dim not in (0, -weight.dim()):
        return NotImplemented
    index = index + weight.shape[0] if index < 0 else index
    return weight.slices((index,))[index]


def _index(func: Any, weight: Any, indices: Sequence[torch.Tensor | None]) -> Any:
    first = indices[0] if indices else None
    if not _is_stack(weight) or first is None or first.dtype not in (torch.int64, torch.int32) or not _may_wait(weight):
        return NotImplemented
    count = weight.shape[0]
    return func(weight.slices([int(i) % count for i in first.unique()]), indices)


def _transpose(func: Any, weight: Any, first: int, second: int) -> Any:
    last = {weight.dim() - 1, weight.dim() - 2}
    if not _is_stack(weight) or {first % weight.dim(), second % weight.dim()} != last:
        return NotImplemented
    return CompressedWeight(weight.values, not weight.transposed)


def _grouped_mm(func: Any, x: Any, weight: Any, offsets: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    if not _is_stack(weight) or isinstance(x, CompressedWeight) or offsets is None or x.dim() != 2:
        return NotImplemented
    if not _may_wait(weight):
        return NotImplemented
    sizes = offsets.diff(prepend=offsets.new_zeros(1))  # rows of x for each matrix
    return func(x, weight.slices(sizes.nonzero().flatten().tolist()), offsets, *args, **kwargs)


def _embedding(func: Any, weight: Any, ids: torch.Tensor, *args: Any) -> Any:
    if not isinstance(weight, CompressedWeight) or weight.spec.matrix_shape() != weight.spec.shape:
        return NotImplemented
    return weight.spec.embedding(ids, weight.parts)


def _may_wait(weight: CompressedWeight) -> bool:
    """Whether values on the device may be looked at, to decode what is needed only: not while a graph is captured."""
    return weight.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _is_stack(weight: Any) -> bool:
    return isinstance(weight, CompressedWeight) and weight.values.is_stack


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.select.int: _select,
    torch.ops.aten.index.Tensor: _index,
    torch.ops.aten.transpose.int: _transpose,
    torch.ops.aten._grouped_mm.default: _grouped_mm,
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
