"""One layer at a time, without an engine: memory while loading, values, products, fallbacks and refusals."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from torch.nn import functional  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # noqa: E402
from vllm.model_executor.model_loader.reload import (  # noqa: E402
    finalize_layerwise_processing,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from bitforbit.errors import CompressedParameterError, MissingTensorError, UsageError  # noqa: E402
from bitforbit.integrations.vllm import experts, parameter  # noqa: E402
from bitforbit.integrations.vllm.embedding import BitforbitEmbeddingMethod, TiedHeadMethod  # noqa: E402
from bitforbit.nn.spec import PARTS  # noqa: E402
from torch_helpers import assert_same_bits, gaussian, random_bits  # noqa: E402

STORED = [f"{part}__weight" for part in PARTS]


def weight_loader(param: Any, loaded_weight: Any) -> None:
    param.data.copy_(loaded_weight)


def layer_of(rows: int, cols: int, dtype: Any = torch.bfloat16, method: Any = None) -> Any:
    layer: Any = torch.nn.Module()
    layer.quant_method = method or BitforbitEmbeddingMethod("exact", "model.embed_tokens")
    layer.quant_method.create_weights(layer, cols, [rows], cols, rows, params_dtype=dtype, weight_loader=weight_loader)
    return layer


def loaded(weight: Any, method: Any = None) -> Any:
    layer = layer_of(*weight.shape, weight.dtype, method)
    layer.weight.weight_loader(layer.weight, weight)
    layer.quant_method.process_weights_after_loading(layer)  # as vLLM does for all layers, in the end
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_and_products(dtype: Any) -> None:
    weight = gaussian((192, 96), dtype)
    layer, stock = loaded(weight), loaded(weight, UnquantizedEmbeddingMethod())
    assert {str(p.dtype) for p in layer.parameters()} == {"torch.uint8"}
    assert sum(p.numel() for p in layer.parameters()) < weight.numel() * weight.element_size()
    ids = torch.tensor([[0, 191, 5], [5, 64, 63]])
    assert_same_bits(layer.quant_method.embedding(layer, ids), functional.embedding(ids, weight))
    for tokens in (1, 7):
        x = gaussian((tokens, 96), dtype, seed=tokens)
        expected = stock.quant_method.apply(stock, x)
        assert_same_bits(layer.quant_method.apply(layer, x), expected)
        compiled = torch.compile(layer.quant_method.apply, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(layer, x), expected)


def test_bias() -> None:
    weight, bias, x = gaussian((64, 64)), gaussian((64,), seed=1), gaussian((3, 64), seed=2)
    stock = layer_of(64, 64, method=UnquantizedEmbeddingMethod())
    weight_loader(stock.weight, weight)
    stock.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    stock.quant_method.process_weights_after_loading(stock)
    layer = loaded(weight)
    assert_same_bits(layer.quant_method.apply(layer, x, bias), stock.quant_method.apply(stock, x, stock.bias))


def test_no_memory_before_loading_and_one_layer_at_a_time() -> None:
    layer = layer_of(64, 64)
    assert layer.weight.is_meta
    layer.weight.weight_loader(layer.weight, gaussian((64, 64)))
    assert "weight" not in layer._parameters


def test_what_does_not_get_smaller_stays_plain() -> None:
    weight = random_bits((64, 64), torch.bfloat16)
    layer = loaded(weight)
    assert_same_bits(layer.weight.detach(), weight)
    assert_same_bits(layer.quant_method.embedding(layer, torch.arange(64)), weight)


def test_tied_head() -> None:
    embeddings, head = layer_of(64, 64), layer_of(64, 64)
    head = head.quant_method.tie_weights(head, embeddings)
    assert head.weight is embeddings.weight
    weight, x = gaussian((64, 64)), gaussian((2, 64), seed=1)
    embeddings.weight.weight_loader(embeddings.weight, weight)
    for layer in (embeddings, head):
        layer.quant_method.process_weights_after_loading(layer)
    assert not list(head.parameters())
    alone = loaded(weight)
    assert_same_bits(head.quant_method.apply(head, x), alone.quant_method.apply(alone, x))
    assert_same_bits(head.weight.clone(), weight)


def test_head_of_its_own_into_a_tied_one() -> None:
    """And none again: the head follows the embeddings, or what was loaded into it, never what was there before."""
    embeddings, head = layer_of(64, 64), layer_of(64, 64)
    model = torch.nn.ModuleList([embeddings, head.quant_method.tie_weights(head, embeddings)])
    record_metadata_for_reloading(model)
    x = gaussian((2, 64), seed=1)
    for first, second in ((0, None), (1, None), (2, 3), (4, 5)):
        rows = [gaussian((64, 64), seed=10 + seed) for seed in (first, first if second is None else second)]
        if first:
            initialize_layerwise_reload(model)
        embeddings.weight.weight_loader(embeddings.weight, rows[0])
        if second is not None:
            head.weight.weight_loader(head.weight, rows[1])
        finalize_layerwise_processing(model, None)
        for layer in model if not first else ():
            layer.quant_method.process_weights_after_loading(layer)
        for layer, weight in zip(model, rows, strict=True):
            alone = loaded(weight)
            expected = alone.quant_method.apply(alone, x)
            assert_same_bits(layer.quant_method.apply(layer, x), expected)
        assert_same_bits(embeddings.quant_method.embedding(embeddings, torch.arange(64)), rows[0])


def test_head_with_the_bits_of_the_embeddings() -> None:
    weight = gaussian((64, 64))
    embeddings = loaded(weight)
    for seed, tied in ((0, True), (7, False)):
        method = BitforbitEmbeddingMethod("exact", "lm_head")
        method.twin = weakref.ref(embeddings)
        head = loaded(gaussian((64, 64), seed=seed), method)
        assert isinstance(head.quant_method, TiedHeadMethod) == tied
        assert bool(list(head.parameters())) != tied
        x = gaussian((2, 64), seed=1)
        alone = loaded(gaussian((64, 64), seed=seed))
        assert_same_bits(head.quant_method.apply(head, x), alone.quant_method.apply(alone, x))


def test_weight_of_a_compressed_layer() -> None:
    """Code that looks at it sees what it would see of a plain one, and cannot change it."""
    weight = gaussian((64, 96))
    layer = loaded(weight)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (weight.shape, weight.dtype, weight.device)
    assert_same_bits(layer.weight.clone(), weight)
    assert_same_bits(layer.weight[3:40, 5:].clone(), weight[3:40, 5:].clone())
    assert_same_bits(layer.weight.t() @ layer.weight, weight.t() @ weight)
    with pytest.raises(CompressedParameterError, match="reload_weights"):
        layer.weight.copy_(weight)
    assert not any(name == "weight" for name, _ in layer.named_parameters())


@pytest.mark.parametrize("other", [gaussian((64, 96), seed=5), random_bits((64, 96), torch.bfloat16)])
def test_weights_loaded_anew(other: Any) -> None:
    """Of another compressed size, or not compressible at all; and those before once more."""
    weight = gaussian((64, 96))
    layer = layer_of(64, 96)
    record_metadata_for_reloading(layer)
    for number, values in enumerate((weight, other, weight)):
        if number:
            initialize_layerwise_reload(layer)
        layer.weight.weight_loader(layer.weight, values)
        finalize_layerwise_processing(layer, None)
        layer.quant_method.process_weights_after_loading(layer)
        assert_same_bits(layer.weight.detach().clone(), values)
        assert_same_bits(layer.quant_method.embedding(layer, torch.arange(64)), values)
        stored = {"weight"} if values is other and parameter.spec_of(layer) is None else set(STORED)
        assert {name for name, _ in layer.named_parameters()} == stored


def test_the_same_weights_loaded_anew_stay_where_they_are() -> None:
    """Captured graphs hold addresses."""
    layer = layer_of(64, 96)
    record_metadata_for_reloading(layer)
    layer.weight.weight_loader(layer.weight, gaussian((64, 96)))
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    initialize_layerwise_reload(layer)
    layer.weight.weight_loader(layer.weight, gaussian((64, 96)))
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == before


def test_weights_that_no_file_has() -> None:
    layer = layer_of(64, 64)
    with pytest.raises(MissingTensorError, match=r"model\.embed_tokens"):
        layer.quant_method.process_weights_after_loading(layer)


def test_experts_that_must_be_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    moving, still = (SimpleNamespace(moe_parallel_config=SimpleNamespace(enable_eplb=on)) for on in (True, False))
    with pytest.raises(UsageError, match=r"mlp\.experts: expected enable_eplb to be off"):
        experts.BitforbitExpertsMethod(moving, "mlp.experts")
    for targets in (None, ["q_proj", "experts"]):
        config = SimpleNamespace(lora_config=SimpleNamespace(target_modules=targets))
        monkeypatch.setattr(experts, "get_current_vllm_config_or_none", lambda config=config: config)
        with pytest.raises(UsageError, match=r"mlp\.experts: expected no adapters for compressed experts"):
            experts.BitforbitExpertsMethod(still, "mlp.experts")


def test_layers_are_freed() -> None:
    layer = layer_of(64, 64)
    record_metadata_for_reloading(layer)
    layer.weight.weight_loader(layer.weight, gaussian((64, 64)))
    layer.quant_method.process_weights_after_loading(layer)
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
