"""Linear layers of vLLM with a compressed weight."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from bitforbit.integrations.vllm import parameter, products


@register_weight_loader_v2_supported_method
class BitforbitLinearMethod(LinearMethodBase):
    """vLLM creates, shards and fuses the weight; this compresses it once it is loaded, and multiplies by it."""

    uses_meta_device = True

    def __init__(self, mode: str, prefix: str) -> None:
        self.mode = mode
        self.prefix = prefix
        self.stock = UnquantizedLinearMethod()

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """See vLLM."""
        parameter.register(layer, self.prefix)
        parameter.create_on_meta(self.stock.create_weights, layer, *args, **kwargs)
        self.rows = int(layer.weight.shape[0])

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Compress the weight. Raises MissingTensorError."""
        if parameter.is_new(layer, self.prefix) and not parameter.compress(layer, "weight"):
            self.stock.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See vLLM."""
        name = parameter.name_of(layer)
        if name is not None and torch.compiler.is_compiling():
            product: torch.Tensor = torch.ops.bitforbit_vllm.linear(x, bias, name, self.rows)
            return product
        if parameter.spec_of(layer) is None:
            plain: torch.Tensor = self.stock.apply(layer, x, bias)
            return plain
        return products.linear(layer, x, bias, self.mode)
