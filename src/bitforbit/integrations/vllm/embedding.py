"""Embeddings and output heads of vLLM with a compressed weight, tied ones among them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

from bitforbit.integrations.vllm import parameter, products


class BitforbitEmbeddingMethod(QuantizeMethodBase):
    """Rows are decoded as they are looked up; a head multiplies as linear layers do."""

    uses_meta_device = True

    def __init__(self, mode: str, prefix: str) -> None:
        self.mode = mode
        self.prefix = prefix
        self.stock = UnquantizedEmbeddingMethod()
        self.twin: weakref.ref[torch.nn.Module] | None = None
        """Embeddings whose weight may turn out to be the same as this head's."""

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """See vLLM."""
        parameter.register(layer, self.prefix)
        parameter.create_on_meta(self.stock.create_weights, layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Compress the weight. Raises MissingTensorError."""
        if not parameter.is_new(layer, self.prefix):
            return
        if not parameter.compress(layer, "weight"):
            self.stock.process_weights_after_loading(layer)
        twin = None if self.twin is None else self.twin()
        first = get_layerwise_info(layer).kernel_tensors is None  # later, vLLM puts the parts back where they were
        if first and twin is not None and parameter.is_same(layer, twin):
            layer.quant_method = TiedHeadMethod(twin, self)
            layer.quant_method.process_weights_after_loading(layer)

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
        layer.quant_method = TiedHeadMethod(embed_tokens, self)
        return layer


class TiedHeadMethod(QuantizeMethodBase):
    """An output head that has no weight of its own, until one is loaded into it in place of the shared one."""

    def __init__(self, embeddings: torch.nn.Module, own: BitforbitEmbeddingMethod) -> None:
        self.embeddings = embeddings
        self.own = own

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Nothing to create."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Forget the parameter that stood for the shared weight, unless a running engine was given one for it."""
        info = get_layerwise_info(layer)
        if info.kernel_tensors is not None and info.load_numel > 0:
            layer.quant_method = self.own
            self.own.process_weights_after_loading(layer)
            return
        parameter.prepare_reload(layer)
        parameter.drop(layer)
        # Not as a parameter, which it is of the embeddings: for code that asks for dtype and device.
        layer.__dict__["weight"] = self.embeddings.weight

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, from the weight of the embeddings."""
        logits: torch.Tensor = self.embeddings.quant_method.apply(self.embeddings, x, bias)
        return logits


def adopt(model: torch.nn.Module, quantization: Any, untied: bool) -> None:
    """Prepare the embeddings of a model whose weights are about to be loaded.

    Many models of vLLM make embeddings without asking the quantization method: these get a method of ours here.
    ``untied``: the model's config ties the head to the embeddings, but the files hold both; a copy is held once.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, VocabParallelEmbedding)]
    owners: dict[int, VocabParallelEmbedding] = {}
    for name, layer in sorted(layers, key=lambda entry: isinstance(entry[1], ParallelLMHead)):
        if type(layer.quant_method) is not UnquantizedEmbeddingMethod or quantization.keeps(layer.prefix or name):
            continue
        shared = owners.setdefault(id(layer.weight), layer)
        if shared is not layer:
            layer.quant_method = TiedHeadMethod(shared, BitforbitEmbeddingMethod(quantization.mode, name))
            get_layerwise_info(layer).reset()
            continue
        layer.quant_method = BitforbitEmbeddingMethod(quantization.mode, name)
        layer.use_fused_embedding = False  # vLLM's kernel reads plain rows
        parameter.register(layer, name)
        plain, empty = layer.weight, to_meta_tensor(layer.weight)
        for module in model.modules():
            for key, value in module._parameters.items():
                if value is plain:
                    module._parameters[key] = empty
        owners[id(empty)] = layer
        initialize_online_processing(layer)
    ours = [layer for _, layer in layers if isinstance(layer.quant_method, BitforbitEmbeddingMethod)]
    heads = [layer for layer in ours if isinstance(layer, ParallelLMHead)]
    if untied and len(heads) == 1 and len(ours) == 2:
        (embeddings,) = (layer for layer in ours if layer is not heads[0])
        heads[0].quant_method.twin = weakref.ref(embeddings)
