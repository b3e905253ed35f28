"""``model.num_parameters`` of compressed models: elements, where transformers' own would count bytes of parts."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitforbit.nn import compressed_parameters, part_name


def num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Number of parameters of the plain model, tied ones counted once; the arguments are those of transformers.

    Of a model that is split over processes, those of this process' parts.
    """
    counted: set[Any] = set()
    total = 0
    for module in model.modules():
        left_out = exclude_embeddings and isinstance(module, nn.Embedding)
        parts: set[str] = set()
        for name, spec in compressed_parameters(module).items():
            own = [part_name(part, name) for part in spec.part_names]
            parts |= {*own}
            key = (id(module._parameters[own[0]]), spec)  # matrices of a DFloat11 unit share their parts
            if key not in counted and not left_out and not only_trainable:
                total += spec.elements
            counted.add(key)
        for name, parameter in module._parameters.items():
            if parameter is None or name in parts or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            if not (left_out and name == "weight") and (parameter.requires_grad or not only_trainable):
                total += parameter.numel()
    return total
