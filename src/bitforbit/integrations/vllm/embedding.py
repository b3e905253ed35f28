"""Embeddings and output heads of vLLM with a compressed weight, tied ones among them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from bitforbit.integrations.vllm import parameter, products


class BitforbitEmbeddingMethod(QuantizeMethodBase):
    """Rows are decoded as they are looked up; a head multiplies as linear layers do."""

    uses_meta_device = True

    def __init__(self, mode: str, prefix: str) -> None:
        self.mode = mode
        self.prefix = prefix
        self.stock = UnquantizedEmbeddingMethod()

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """See vLLM."""
        parameter.register(layer, self.prefix)
        parameter.create_on_meta(self.stock.create_weights, layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Compress the weight. Raises MissingTensorError."""
        if parameter.is_new(layer, self.prefix) and not parameter.compress(layer, "weight"):
            self.stock.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of a head: x ``[tokens, cols]`` -> ``[tokens, rows]``."""
        if parameter.spec_of(layer) is None:
            plain: torch.Tensor = self.stock.apply(layer, x, bias)
            return plain
        return products.linear(layer, x, bias, self.mode)

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Rows by number, ``[*input_.shape, cols]``."""
        name = parameter.name_of(layer)
        if name is not None and torch.compiler.is_compiling():
            rows: torch.Tensor = torch.ops.bitforbit_vllm.embedding(
                input_, name, layer.embedding_dim, layer.params_dtype
            )
            return rows
        spec = parameter.spec_of(layer)
        if spec is None:
            plain: torch.Tensor = self.stock.embedding(layer, input_)
            return plain
        return spec.embedding(input_, parameter.parts_of(layer, spec))

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Let a head use the weight of the embeddings."""
        # Until the weights are loaded the two share a parameter: by this vLLM's loader knows that they are tied.
        layer.weight = embed_tokens.weight
        get_layerwise_info(layer).reset()
        layer.quant_method = TiedHeadMethod(embed_tokens)
        return layer


class TiedHeadMethod(QuantizeMethodBase):
    """An output head that has no weight of its own."""

    def __init__(self, embeddings: torch.nn.Module) -> None:
        self.embeddings = embeddings

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Nothing to create."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Forget the parameter that stood for the shared weight."""
        layer._parameters.pop("weight", None)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, from the weight of the embeddings."""
        logits: torch.Tensor = self.embeddings.quant_method.apply(self.embeddings, x, bias)
        return logits
