"""Tied weights under their compressed names.

transformers ties parameters by name (``lm_head.weight`` -> ``model.embed_tokens.weight``). A compressed parameter has
four names instead of one, so the mappings in the model are rewritten whenever a tied parameter changes its form.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitforbit.integrations.names import spec_of, stored_name


class Ties:
    """The ties of one model, under the names that they have while nothing is compressed."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Must be made before anything in the model is compressed."""
        self._all: dict[str, str] = dict(model.all_tied_weights_keys)
        self._classes: list[tuple[PreTrainedModel, Any, dict[str, str]]] = []
        for submodel in model.modules():
            declared = getattr(submodel, "_tied_weights_keys", None)
            if isinstance(submodel, PreTrainedModel) and isinstance(declared, dict):
                expanded = submodel.get_expanded_tied_weights_keys(all_submodels=False)
                self._classes.append((submodel, declared, expanded))

    def twins(self, name: str) -> list[str]:
        """The other parameters that are tied to this one."""
        source = self._all.get(name, name)
        group = {source, *(target for target, of in self._all.items() if of == source)}
        return sorted(group - {name}) if name in group else []

    @property
    def names(self) -> set[str]:
        """Names of all parameters that are tied to others."""
        return {*self._all, *self._all.values()}

    def rewrite(self, model: PreTrainedModel) -> None:
        """Bring the model's mappings in line with the forms that its parameters have now."""
        model.all_tied_weights_keys = _renamed(model, self._all)
        for submodel, _, expanded in self._classes:
            if expanded:
                submodel._tied_weights_keys = _renamed(submodel, expanded)

    def restore(self, model: PreTrainedModel) -> None:
        """Put the original mappings back, for a model in which nothing is compressed any more."""
        model.all_tied_weights_keys = dict(self._all)
        for submodel, declared, _ in self._classes:
            submodel._tied_weights_keys = declared


def _renamed(model: nn.Module, ties: dict[str, str]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for target, source in ties.items():
        mine, theirs = spec_of(model, target), spec_of(model, source)
        if mine is None and theirs is None:
            renamed[target] = source
        elif mine is not None and theirs is not None and mine.layout == theirs.layout:
            renamed |= {stored_name(target, part): stored_name(source, part) for part in mine.part_names}
        # Otherwise the files hold two different tensors, of which coding pays for one only: they are not tied.
    return renamed
