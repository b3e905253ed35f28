"""The tensors of the plain checkpoint that a compressed model stands for: names and shapes at once, values on demand.

That is what ``save_pretrained`` of the plain model would write: tied tensors once, names and layouts (experts apart) as
in checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.accelerate import load_offloaded_parameter

from bitforbit.errors import UsageError
from bitforbit.integrations.names import is_compressed, spec_of, stored_name
from bitforbit.nn import CompressedSpec, compressed_parameters
from bitforbit.nn.values import decode

_GROUPS_AT_ONCE = 3
"""Converted groups that are held: a layer's stacks of experts, whose tensors alternate in the file."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Parameters that a conversion takes together, or one that is only renamed (``renamed``)."""

    inputs: tuple[str, ...]
    renamed: str | None


class Originals:
    """The tensors of one model. ``shapes`` maps their names to dtype and shape, ``sources`` to names of parameters."""

    def __init__(self, model: PreTrainedModel, as_in_checkpoint: bool) -> None:
        """``as_in_checkpoint``: undo the conversions that loading made. Raises UsageError for what is no tensor."""
        self._model = model
        self._open: OrderedDict[int, dict[str, torch.Tensor]] = OrderedDict()
        self._groups = _groups(model, distinct_names(model), as_in_checkpoint)
        self._group_of: dict[str, int] = {}
        self.shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        for index, group in enumerate(self._groups):
            for name, value in self._outputs(group, {n: self._empty(n) for n in group.inputs}).items():
                self.shapes[name] = value.dtype, tuple(value.shape)
                self.sources[name] = group.inputs
                self._group_of[name] = index

    def is_compressed(self, name: str) -> bool:
        """Whether the model holds any of what this tensor is made of in compressed form."""
        return any(is_compressed(self._model, source) for source in self.sources[name])

    def value(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, contiguous, in CPU memory."""
        index = self._group_of[name]
        group = self._groups[index]
        if group.renamed is not None:
            return self._parameter(group.inputs[0]).contiguous()
        if index not in self._open:
            while len(self._open) >= _GROUPS_AT_ONCE:
                self._open.popitem(last=False)
            self._open[index] = self._outputs(group, {n: self._parameter(n) for n in group.inputs})
        self._open.move_to_end(index)
        return self._open[index][name].contiguous()

    def _outputs(self, group: _Group, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if group.renamed is not None:
            return {group.renamed: values[group.inputs[0]]}
        outputs: dict[str, torch.Tensor] = revert_weight_conversion(self._model, values)
        return outputs

    def _empty(self, name: str) -> torch.Tensor:
        spec = spec_of(self._model, name)
        if spec is not None:
            return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        value = self._model.get_parameter_or_buffer(name)
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"expected {name} to be a tensor, got {type(value).__name__}; it cannot be saved")
        return torch.empty_like(value, device="meta")

    def _parameter(self, name: str) -> torch.Tensor:
        return decoded(self._model, name).cpu()


def decoded(model: PreTrainedModel, name: str) -> torch.Tensor:
    """The plain values of a parameter or buffer by full name, where it is; from the disk if it is offloaded."""
    spec = spec_of(model, name)
    if spec is None:
        return _loaded(model, name)
    return decode(spec, [_loaded(model, stored_name(name, part)) for part in spec.part_names])


def _loaded(model: PreTrainedModel, name: str) -> torch.Tensor:
    value: torch.Tensor = model.get_parameter_or_buffer(name)
    return (load_offloaded_parameter(model, name) if value.is_meta else value).detach()


def distinct_names(model: PreTrainedModel) -> list[str]:
    """Names of all parameters and persistent buffers, compressed ones under their plain names, tied ones once."""
    holders: dict[int | tuple[int, CompressedSpec], list[str]] = {}
    targets = {*(model.all_tied_weights_keys or ())}
    ignored = set(model._keys_to_ignore_on_save or ())
    specs = dict(_compressed_specs(model))
    parts = {stored_name(name, part): name for name, spec in specs.items() for part in spec.part_names}
    for key, value in model.state_dict(keep_vars=True).items():
        name = parts.get(key, key)
        if name == key:
            holders.setdefault(id(value), []).append(key)
        elif key == stored_name(name, specs[name].part_names[0]):
            # Parts may be shared by different matrices.
            holders.setdefault((id(value), specs[name]), []).append(key)
    kept = []
    for keys in holders.values():
        # Of declared ties the source is written; of others every copy, as loading does not restore those.
        sources = [key for key in keys if key not in targets] or keys[:1]
        kept += [name for key in sources if (name := parts.get(key, key)) not in ignored]
    return kept


def _compressed_specs(model: PreTrainedModel) -> Iterable[tuple[str, CompressedSpec]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, spec in compressed_parameters(module).items():
            yield f"{prefix}.{name}" if prefix else name, spec


def _groups(model: PreTrainedModel, names: Sequence[str], as_in_checkpoint: bool) -> list[_Group]:
    """As transformers' revert_weight_conversion sorts them; that one needs all values at once."""
    conversions = _conversions(model) if as_in_checkpoint else None
    if conversions is None:
        return [_Group((name,), name) for name in names]
    transforms = [transform.reverse_transform() for transform in conversions[::-1]]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    groups: dict[str, _Group] = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, reverse=True)
        before = groups[key].inputs if key in groups else ()
        groups[key] = _Group((*before, name), key if pattern is None else None)
    return list(groups.values())


def _conversions(model: PreTrainedModel) -> list[WeightTransform] | None:
    """What loading did to the checkpoint's tensors, or would have done; None for nothing."""
    used: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if used is not None:
        return used
    known = get_model_conversion_mapping(model, add_legacy=False)
    return [t for t in known if not isinstance(t, PrefixChange)] or None
