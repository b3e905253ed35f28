"""Tensor and expert parallelism: every process reads its part of each parameter and keeps it compressed on its own.

transformers turns the parameters of its plan into DTensors without data, which say what part is whose, and wraps the
forwards of modules. Here the part is restored from the files, compressed (the coding is deterministic) and installed
in the place of the DTensor; the wrapped forward then runs on it as on any local tensor. What the styles do to inputs
and outputs is left to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.distributed.sharding_utils import DtensorShardOperation

from bitforbit.errors import ModelLoadError, UsageError
from bitforbit.integrations.names import is_compressed, split
from bitforbit.integrations.source import NativeSource
from bitforbit.integrations.transformers import parallel_plan

_Result = TypeVar("_Result")

_FORWARD = "forward"
_LOCAL = "_hf_quantized_needs_local_tp"
"""Mark of transformers: the module's forward wants local tensors, also where gradients are on."""
_ROWS = "_bitforbit_rows"
"""Rows [begin, end) of the whole table that an embedding holds."""
_SUMMED = "_bitforbit_summed"
"""The processes over which the outputs of a module are to be summed here."""


def sharding_of(model: PreTrainedModel) -> Sharding | None:
    """How a model is to be split over processes; None if it is not.

    Raises UsageError, before anything is read, for ways of splitting that compressed models do not have, for styles
    that are unknown, and for numbers of processes that do not divide what must be divided.
    """
    size = parallel_plan.degree(model)
    if size == 1:
        return None
    parallel_plan.check(model, size)
    return Sharding(model)


class Sharding:
    """One model's parts in this process."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.placeholders: dict[str, DTensor] = {}
        """What transformers had put in the place of parameters that are compressed now, by name."""
        self._agreed = False

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(dist.get_rank())

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(dist.get_world_size())

    @property
    def device(self) -> torch.device:
        """Where this process's parts are to be."""
        kind = self._model._device_mesh.device_type
        return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())

    # --- before transformers distributes the model ---------------------------------------------------------------

    def prepare(self) -> None:
        """Let the forwards that transformers is about to wrap be those of the classes that modules will have then."""
        for module in self._model.modules():
            matrices = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
            if matrices and _FORWARD not in module.__dict__:
                module.forward = functools.partial(_forward, module)

    # --- while the loader runs -----------------------------------------------------------------------------------

    def part(self, source: NativeSource, name: str, target: str, index: int, check: bool) -> torch.Tensor | None:
        """This process's part of a stored tensor, the ``index``-th of those that a conversion makes ``target`` of.

        None if it has none: experts that other processes hold.
        """
        stored = StoredPart(source, name, check)
        whole = self._whole(target)
        if isinstance(whole, DTensor):
            value = DtensorShardOperation(whole).shard_tensor(stored, tensor_idx=self._place(stored, whole, index))
        else:
            value = stored[...]
        stored.finish()
        return None if value is None else value.to(self.device)

    def _whole(self, target: str) -> torch.Tensor:
        known = self.placeholders.get(target)
        return self._model.get_parameter_or_buffer(target) if known is None else known

    def _place(self, stored: StoredPart, whole: DTensor, index: int) -> int | None:
        return index if len(stored.get_shape()) == whole.ndim - 1 else None

    def localize(self, names: Iterable[str]) -> None:
        """Put plain parameters of the part's shape in the places of DTensors. Raises UsageError for odd ties."""
        for name in names:
            module_name, own = split(name)
            parameters = self._model.get_submodule(module_name)._parameters
            whole = parameters.get(own)
            if isinstance(whole, DTensor):
                self.placeholders[name] = whole
                local = torch.empty(whole.to_local().shape, dtype=whole.dtype, device="meta")
                parameters[own] = nn.Parameter(local, requires_grad=False)
        self._check_ties(list(names))

    def _check_ties(self, names: list[str]) -> None:
        kinds = {self.placeholders[name].placements if name in self.placeholders else () for name in names}
        if len(kinds) > 1:
            raise UsageError(
                f"expected {' and '.join(names)}, which are tied, to be split the same way, got {kinds}; give both the "
                "same rows in tp_plan (transformers 5.23 does it by itself), or run the model with vLLM"
            )

    def settle(self, names: Iterable[str]) -> None:
        """After :meth:`localize`: mark what is compressed now, and put DTensors back where nothing is."""
        for name in names:
            whole = self.placeholders.get(name)
            module_name, own = split(name)
            module = self._model.get_submodule(module_name)
            if whole is None:
                continue
            if not is_compressed(self._model, name):
                module._parameters[own] = self.placeholders.pop(name)
                continue
            module.__dict__[_LOCAL] = True
            if isinstance(module, nn.Embedding):
                shape, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
                if shape[0] != whole.shape[0]:
                    module.__dict__[_ROWS] = offset[0], offset[0] + shape[0]

    # --- after it has run ----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Take back what :meth:`prepare` did where transformers wrapped nothing, and wait for the other processes.

        Raises ModelLoadError if one of them failed.
        """
        for module in self._model.modules():
            forward = module.__dict__.get(_FORWARD)
            if isinstance(forward, functools.partial) and forward.func is _forward:
                del module.__dict__[_FORWARD]
        for name in parallel_plan.unsummed_experts(self._model):
            parts = [whole for own, whole in self.placeholders.items() if own.startswith(f"{name}.")]
            if parts:
                self._model.get_submodule(name).__dict__[_SUMMED] = parts[0].device_mesh.get_group()
        self.agree(None)

    def guarded(self, work: Callable[[], _Result]) -> _Result:
        """The result of work that may fail in this process alone: the others are told, and fail as well."""
        try:
            return work()
        except Exception as error:
            self.agree(error)
            raise

    def agree(self, error: Exception | None) -> None:
        """Tell the other processes how loading went here, once. Raises ModelLoadError if one of them failed."""
        if self._agreed:
            return
        self._agreed = True
        reports: list[str | None] = [None] * self.size
        dist.all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}")
        failed = [(rank, report) for rank, report in enumerate(reports) if report is not None and rank != self.rank]
        if error is None and failed:
            raise ModelLoadError(f"process {failed[0][0]} of {self.size} could not load its part: {failed[0][1]}")

    def release(self) -> None:
        """Make the parts DTensors again, tied ones together, for a model in which nothing is compressed any more."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for name, whole in self.placeholders.items():
            module_name, own = split(name)
            module = self._model.get_submodule(module_name)
            local = module._parameters[own]
            if local is not None and not isinstance(local, DTensor):
                if local not in made:
                    made[local] = nn.Parameter(like(whole, local.detach()), requires_grad=False)
                module._parameters[own] = made[local]
            for mark in (_LOCAL, _ROWS, _SUMMED):
                module.__dict__.pop(mark, None)
        self.placeholders.clear()


def like(whole: DTensor, local: torch.Tensor) -> DTensor:
    """A DTensor that is split as ``whole`` is, of this process's part."""
    return DTensor.from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


class StoredPart:
    """A stored tensor as the loader's sharding wants it: slices of it are restored when they are asked for."""

    def __init__(self, source: NativeSource, name: str, check: bool) -> None:
        self._source = source
        self._name = name
        self._check = check
        self._shape = source.tensors[name].shape

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        index = index if isinstance(index, tuple) else (index,)
        given = index[: index.index(...)] if ... in index else index
        slices = [*given, *[slice(None)] * (len(self._shape) - len(given))]
        ranges = [each.indices(size)[:2] for each, size in zip(slices, self._shape, strict=True)]
        (begin, end), *middle = ranges
        columns = middle.pop() if middle else None
        if begin == end or all(cut == (0, size) for cut, size in zip(middle, self._shape[1:-1], strict=True)):
            return self._read((begin, end), columns)[(slice(None), *(slice(*cut) for cut in middle))]
        # Of a stack one matrix at a time, as all its rows are decoded.
        cuts = (slice(None), *(slice(*cut) for cut in middle))
        return torch.cat([self._read((i, i + 1), columns)[cuts] for i in range(begin, end)])

    def _read(self, rows: tuple[int, int], columns: tuple[int, int] | None) -> torch.Tensor:
        check, self._check = self._check, False
        return self._source.restore_slice(self._name, rows, columns, check=check)

    def finish(self) -> None:
        """Check what is to be checked and was not read."""
        if self._check:
            self._read((0, 0), None)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    rows = module.__dict__.get(_ROWS)
    if rows is not None:
        return _lookup(module, rows, *args, **kwargs)
    output = type(module).forward(module, *args, **kwargs)
    processes = module.__dict__.get(_SUMMED)
    if processes is not None:
        dist.all_reduce(output, group=processes)
    return output


def _lookup(module: nn.Module, rows: tuple[int, int], ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """From a table split by rows: those of other processes count as zeros, as with a DTensor of torch."""
    begin, end = rows
    others = (ids < begin) | (ids >= end)
    values: torch.Tensor = type(module).forward(module, (ids - begin).masked_fill(others, 0), *args, **kwargs)
    return values.masked_fill(others.unsqueeze(-1), 0)
