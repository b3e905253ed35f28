"""What a quantized cache is not for, and what it says then."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as tf

import bitforbit
from bitforbit.errors import KvCacheError, KvSpecError, NonFiniteKeysError
from bitforbit.integrations.transformers.kv import NAME, figures
from bitforbit.integrations.transformers.kv.handle import _NAMES
from bitforbit.kv import KiviCache, KiviSpec
from integrations.kv_models import make, prompts

TEXT: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 97}


@pytest.fixture
def llama() -> Any:
    return make()


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tf.T5Config(num_layers=2), "encoder-decoder"),
        (tf.MambaConfig(num_hidden_layers=2), "without num_attention_heads"),
        (tf.CLIPVisionConfig(), "without vocab_size"),
        (tf.DeepseekV3Config(num_hidden_layers=2), "latent attention"),
        (tf.MistralConfig(**TEXT, sliding_window=16), "none among 2 layers (DynamicSlidingWindowLayer)"),
        ({"hidden_size": 64}, "got dict"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_without_a_cache_to_quantize(config: Any, words: str) -> None:
    with pytest.raises(KvCacheError, match=re.escape(words)):
        KiviCache(config)


def test_settings() -> None:
    config = tf.LlamaConfig(**TEXT)
    for settings in ({"k_bits": 3}, {"group": 16}, {"residual": 100}, {"sink": -1}, {"v_group": 128}):
        with pytest.raises(KvSpecError):
            KiviCache(config, **settings)
    with pytest.raises(KvSpecError, match="multiple of 16"):
        KiviCache(tf.LlamaConfig(**TEXT, head_dim=24))
    for layers in ({2: None}, {"0": None}):
        with pytest.raises(KvCacheError, match="indices of 0 to 1"):
            KiviCache(config, layers=layers)
    with pytest.raises(KvCacheError, match="full-attention layers"):
        KiviCache(config, layers={0: None, 1: None})
    gemma = tf.Gemma3TextConfig(**TEXT, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(KvCacheError, match="got 0, DynamicSlidingWindowLayer"):
        KiviCache(gemma, layers={0: KiviSpec()})


def test_models(llama: Any) -> None:
    with pytest.raises(KvCacheError, match="generates text"):
        bitforbit.kivi_cache(llama.model)
    with pytest.raises(KvCacheError, match="model of transformers, got Linear"):
        bitforbit.kivi_cache(torch.nn.Linear(2, 2))
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=2))
    with pytest.raises(KvCacheError, match="AttentionInterface"):
        bitforbit.kivi_cache(bloom)


def test_the_vision_part_keeps_its_attention() -> None:
    text = {**TEXT, "intermediate_size": 64, "num_key_value_heads": 2}
    vision = tf.CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**text), image_token_index=96)
    model = tf.LlavaForConditionalGeneration(config).eval()
    cache = bitforbit.kivi_cache(model, residual=32)
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    model.generate(input_ids=prompts(1, 40)["input_ids"] % 90, past_key_values=cache, max_new_tokens=3)


# --- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention(llama: Any, attention: str) -> None:
    llama.set_attn_implementation(attention)
    with pytest.raises(KvCacheError, match=r"bitforbit\.kivi_cache\(model\)"), torch.no_grad():
        llama(**prompts(1, 40), past_key_values=KiviCache(llama.config))


def test_nothing_can_be_done_with_a_handle(llama: Any) -> None:
    layer = KiviCache(llama.config).layers[0]
    x = torch.randn(1, 2, 3, 32)
    handle, _ = layer.update(x, x)
    for name in _NAMES:
        with pytest.raises(KvCacheError):
            getattr(type(handle), f"__{name}__")(handle, handle)
    for use in (
        lambda: handle.shape,
        lambda: handle.transpose(1, 2),
        lambda: torch.cat([handle, handle]),
        lambda: x @ handle,
        lambda: torch.nn.functional.scaled_dot_product_attention(x, handle, handle),
        lambda: handle[0],
        lambda: list(handle),
    ):
        with pytest.raises(KvCacheError, match="as if they were tensors"):
            use()
    with pytest.raises(KvCacheError, match="after each update"):
        layer.update(x, x)


def test_gradients(llama: Any) -> None:
    with pytest.raises(KvCacheError, match="no_grad"):
        llama(**prompts(1, 40), past_key_values=bitforbit.kivi_cache(llama))
    inputs = prompts(1, 40)
    llama(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert all(p.grad is not None for p in llama.parameters())


def test_training_with_capped_logits() -> None:
    model = make("gemma2")
    bitforbit.kivi_cache(model)
    with pytest.raises(KvCacheError, match="eager"):
        model(**prompts(1, 40), use_cache=False)


def test_another_batch_and_dtype(llama: Any) -> None:
    cache = bitforbit.kivi_cache(llama, residual=32)
    with torch.no_grad():
        llama(**prompts(2, 40), past_key_values=cache)
        with pytest.raises(KvCacheError, match=r"expected rows.* 2, 2, 32.*got 1, 2, 32"):
            llama(prompts(1, 3)["input_ids"], past_key_values=cache)
        with pytest.raises(KvCacheError, match=r"bfloat16"):
            make("llama", torch.bfloat16)(prompts(2, 3)["input_ids"], past_key_values=cache)


def test_keys_and_values_of_other_shapes(llama: Any) -> None:
    layer = KiviCache(llama.config).layers[1]
    with pytest.raises(KvCacheError, match="layer 1: expected keys and values of one shape"):
        layer.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 32))


def test_what_attention_is_asked_for(llama: Any) -> None:
    from bitforbit.integrations.transformers.kv.attention import kivi_attention

    module = llama.model.layers[0].self_attn
    x, q = torch.randn(1, 2, 3, 32), torch.randn(1, 4, 3, 32)

    def handle() -> Any:
        return KiviCache(llama.config).layers[0].update(x, x)[0]

    with pytest.raises(KvCacheError, match="dropout"):
        kivi_attention(module, q, one := handle(), one, None, dropout=0.1)
    with pytest.raises(KvCacheError, match="position_bias"):
        kivi_attention(module, q, one := handle(), one, None, position_bias=x)
    with pytest.raises(KvCacheError, match="those of two"):
        kivi_attention(module, q, handle(), handle(), None)
    one = handle()
    kivi_attention(module, q, one, one, None)
    with pytest.raises(KvCacheError, match=r"layers=\{0: None\}"):
        kivi_attention(module, q, one, one, None)


def test_infinite_keys_name_the_layer(llama: Any) -> None:
    cache = bitforbit.kivi_cache(llama, residual=32)
    with torch.no_grad():
        llama.model.layers[1].self_attn.v_proj.weight[0, 0] = float("inf")
        with pytest.raises(NonFiniteKeysError, match="layer 1"):
            llama(**prompts(1, 80), past_key_values=cache)


# --- the cache's own methods ----------------------------------------------------------------------------------------


def test_crop(llama: Any) -> None:
    cache = bitforbit.kivi_cache(llama, k_bits=8, v_bits=8, residual=32)
    cache.crop(-3)  # nothing in it yet
    with torch.no_grad():
        llama(**prompts(2, 100, padding=(4,)), past_key_values=cache)
    keys = cache.layers[0].state.dequantized()[0]
    cache.crop(0)
    assert cache.get_seq_length() == 100
    cache.crop(-30)
    assert cache.get_seq_length() == 70
    torch.testing.assert_close(cache.layers[0].state.dequantized()[0], keys[:, :, :70], atol=1e-5, rtol=1e-5)
    with pytest.raises(KvCacheError, match="crop: expected 0 or less"):
        cache.crop(10)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0


def test_rows(llama: Any) -> None:
    cache = bitforbit.kivi_cache(llama, residual=32)
    with torch.no_grad():
        llama(**prompts(3, 100, padding=(4, 9)), past_key_values=cache)
    before = cache.layers[1].state.dequantized()[0]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[1].state.dequantized()[0], before[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[1].state.dequantized()[0], before[[0, 2]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[1].state.dequantized()[0], before[[0, 0, 2, 2]])
    assert cache.layers[1].state.start.tolist() == [4, 4, 0, 0]
    assert cache.batch_size == 4
    with torch.no_grad():
        llama(torch.full((4, 1), 5), past_key_values=cache)


def test_what_transformers_asks(llama: Any) -> None:
    cache = bitforbit.kivi_cache(llama, residual=32)
    assert cache.batch_size == -1
    assert not cache.is_initialized
    assert figures(cache).bytes_per_token is None
    with torch.no_grad():
        llama(**prompts(1, 50), past_key_values=cache)
    assert cache.get_mask_sizes(3, 0) == (53, 0)
    assert cache.get_max_length() == -1
    assert cache.get_query_offset() == 50 if hasattr(cache, "get_query_offset") else True
    assert (cache.is_compileable, cache.is_initialized, cache.is_croppable) == (False, True, False)
    assert bitforbit.kivi_cache(llama, residual=None).is_croppable
    assert (cache.is_sliding, cache.is_linear) == ([False, False], [False, False])
    assert repr(cache) == "KiviCache(layers=[KiviLayer(k4v4, 50 tokens), KiviLayer(k4v4, 50 tokens)])"
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        llama(**prompts(2, 50), past_key_values=cache)  # another batch: it is empty
    for method in (cache.layers[0].offload, cache.layers[0].prefetch):
        with pytest.raises(KvCacheError, match="DynamicCache"):
            method()


def test_early_initialization(llama: Any) -> None:
    cache = bitforbit.kivi_cache(llama, residual=32)
    cache.early_initialization(2, 2, 32, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        llama(**prompts(2, 50), past_key_values=cache)
    assert cache.get_seq_length() == 50
