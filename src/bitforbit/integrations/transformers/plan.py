"""Which stored tensor becomes which parameter: names of checkpoints are not always names of parameters.

transformers renames keys (prefixes, old names) and merges, splits or turns tensors (experts, fused projections). The
rules apply to the names of the original checkpoint, so they are asked with those, in the order that the loader uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from bitforbit.errors import MissingTensorError, ShapeMismatchError, UsageError
from bitforbit.integrations.source import StoredTensor


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a stored tensor goes: a parameter or buffer of the model, possibly by way of a converter."""

    target: str
    converted: bool


def destinations(
    model: PreTrainedModel, names: Iterable[str], transforms: Sequence[WeightTransform]
) -> dict[str, Destination]:
    """Destination of every name that the model has a place for."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    places, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Destination] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, places)
        if target not in places and name in places:
            target, pattern = rename_source_key(name, [], [], prefix, places)
        if target in places:
            found[name] = Destination(target, pattern is not None)
    return found


def check_shapes(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], found: Mapping[str, Destination], where: str
) -> None:
    """Raise ShapeMismatchError if a tensor that is loaded as it is does not have its parameter's shape."""
    places = model.state_dict()
    for name, destination in found.items():
        expected = tuple(places[destination.target].shape)
        if not destination.converted and stored[name].shape != expected:
            raise ShapeMismatchError(
                f"{where}, tensor {name!r}: expected shape {list(expected)} for {destination.target}, as config.json "
                f"says, got {list(stored[name].shape)}; weights and config are of different models"
            )


def check_complete(
    model: PreTrainedModel,
    found: Mapping[str, Destination],
    transforms: Sequence[WeightTransform],
    twins: Mapping[str, Sequence[str]],
    where: str,
) -> None:
    """Raise MissingTensorError if the model has a parameter for which there is no tensor.

    Only where the model is of the class that was saved: another class may add a head, which is then to be trained.
    """
    architectures = model.config.architectures
    if architectures and type(model).__name__ not in architectures:
        return
    there = {destination.target for destination in found.values()}
    for destination in found.values():
        if destination.converted:
            there.update(_all_targets(destination.target, transforms))
    ignored = model._keys_to_ignore_on_load_missing or ()
    pattern = re.compile("|".join(f"({regex})" for regex in ignored)) if ignored else None
    for name, _ in model.named_parameters(remove_duplicate=False):
        tied = any(twin in there for twin in twins.get(name, ()))
        if name not in there and not tied and (pattern is None or not pattern.search(name)):
            raise MissingTensorError(
                f"{where}: expected a tensor for {name}, got none; files are missing, or config.json is of "
                "another model"
            )


def _all_targets(first: str, transforms: Sequence[WeightTransform]) -> Iterable[str]:
    for transform in transforms:
        targets = list(transform.target_patterns) if isinstance(transform, WeightConverter) else []
        if len(targets) > 1 and targets[0] in first:
            yield from (first.replace(targets[0], target) for target in targets)


class ParameterShapes(Mapping[str, tuple[int, ...]]):
    """Shapes of the tensors of a checkpoint, by the names that they have there, as the model's parameters have them.

    Raises UsageError when asked for a tensor that transformers merges or splits: its shape is not the parameter's.
    """

    def __init__(self, model: PreTrainedModel, transforms: Sequence[WeightTransform]) -> None:
        self._model = model
        self._transforms = transforms
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def __getitem__(self, name: str) -> tuple[int, ...]:
        destination = destinations(self._model, [name], self._transforms)[name]
        if destination.converted:
            raise UsageError(
                f"{name}: transformers merges or splits this tensor as it loads, which works with bitforbit's own "
                "format only; decompress the DFloat11 model (bitforbit decompress) and load the result"
            )
        return self._shapes[destination.target]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class Dtypes:
    """The dtype that the stock loader gives to each parameter."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype) or {}
        self._pattern, self._keys, _ = build_glob_alternation(list(self._plan)) if self._plan else (None, {}, {})
        self._places = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def knows(self, target: str) -> bool:
        """Whether the model had a parameter or buffer of that name before anything was compressed."""
        return target in self._places

    def of(self, target: str) -> torch.dtype:
        """dtype of a parameter by full name."""
        match = self._pattern.search(target) if self._pattern else None
        return self._plan[self._keys[match.lastgroup]] if match else self._places[target]
