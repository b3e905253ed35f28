"""Parameters of a model that is being loaded: compressed ones take the place of plain ones, tied ones together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from bitforbit.integrations.names import is_compressed, may_compress, split, stored_name
from bitforbit.integrations.transformers.config import BitforbitConfig
from bitforbit.integrations.transformers.ties import Ties
from bitforbit.nn import Compressed, CompressedSpec, compressed_parameters, install_parameter
from bitforbit.nn.parameters import planes, remove_parameter


class Installer:
    """Compresses parameters of one model."""

    def __init__(self, model: PreTrainedModel, config: BitforbitConfig) -> None:
        self.model = model
        self.config = config
        self.ties = Ties(model)

    def may_compress(self, name: str) -> bool:
        """Whether the parameter of that full name is one to be compressed; one that is already counts as such."""
        return may_compress(self.model, name, self.config)

    def install(self, name: str, spec: CompressedSpec, sizes: Mapping[str, int]) -> list[str]:
        """Make a parameter, and those tied to it, compressed, with empty parts on the meta device.

        Returns the names of the twins that have changed their form.
        """
        changed = [twin for twin in self.ties.twins(name) if not is_compressed(self.model, twin)]
        for each in (name, *changed):
            module_name, parameter_name = split(each)
            module = self.model.get_submodule(module_name)
            parts = {part: torch.empty(sizes[part], dtype=torch.uint8, device="meta") for part in spec.part_names}
            install_parameter(module, parameter_name, spec, parts, mode=self.config.mode)
        self.ties.rewrite(self.model)
        return changed

    def compress(self, name: str, value: torch.Tensor, missing_keys: set[str] | None) -> dict[str, torch.Tensor]:
        """The parts of a tensor by full name, for a parameter that is made compressed; itself where that does not pay.

        ``missing_keys`` are names that the loader has no tensor for yet; it ties what is missing.
        """
        module_name, parameter_name = split(name)
        module = self.model.get_submodule(module_name)
        made = planes(value, self.config.threads)
        if made is None:
            self._make_plain(module, parameter_name, value)
            return {name: value}
        return self.keep(name, *made, missing_keys)

    def keep(
        self, name: str, spec: CompressedSpec, parts: Mapping[str, torch.Tensor], missing_keys: set[str] | None
    ) -> dict[str, torch.Tensor]:
        """These parts by full name, for a parameter that is made compressed. See :meth:`compress`."""
        twins = self.install(name, spec, {part: tensor.numel() for part, tensor in parts.items()})
        if missing_keys is not None:
            missing_keys.discard(name)
            missing_keys.difference_update(twins)
            missing_keys.update(stored_name(twin, part) for twin in twins for part in spec.part_names)
        return {stored_name(name, part): tensor for part, tensor in parts.items()}

    def _make_plain(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Undo what a twin did that turned out to be another tensor."""
        if isinstance(module, Compressed) and name in compressed_parameters(module):
            remove_parameter(module, name, nn.Parameter(value.to("meta"), requires_grad=False))
            self.ties.rewrite(self.model)
