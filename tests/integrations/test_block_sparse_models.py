"""Block-sparse prefill inside models of transformers: against the same model with the layout as its mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

import bitforbit  # noqa: E402
from bitforbit.attention import patterns  # noqa: E402
from bitforbit.attention.grid import Grid  # noqa: E402
from bitforbit.attention.tiles import Tiles, layout_mask  # noqa: E402
from bitforbit.errors import AttentionError  # noqa: E402
from bitforbit.integrations.transformers import block_sparse as integration  # noqa: E402
from bitforbit.integrations.transformers.block_sparse import BlockSparseSpec, block_sparse  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BLOCK = 16
TOKENS = 150
IDS = torch.randint(3, 256, (2, TOKENS), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **options)).eval()


def layout_as_mask(name: str, q_tokens: int, kv_tokens: int, density: float) -> torch.Tensor:
    grid = Grid(q_tokens, kv_tokens, BLOCK)
    layout = patterns.with_density(name, grid, density)
    seen = layout_mask(layout, Tiles(BLOCK, BLOCK), q_tokens, kv_tokens)
    return seen & torch.ones(q_tokens, kv_tokens, dtype=torch.bool).tril(kv_tokens - q_tokens)


@pytest.mark.parametrize("name", ["local", "local_global", "butterfly", "strided", "random"])
def test_logits_are_those_of_the_layout_as_a_mask(name: str) -> None:
    model = llama()
    expected = model(IDS[:1], attention_mask=layout_as_mask(name, TOKENS, TOKENS, 0.4)).logits
    dense = model(IDS[:1]).logits
    block_sparse(model, name, 0.4, BLOCK, 0)
    got = model(IDS[:1]).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"pattern": "dense"}, {"density": 1.0}, {"dense_below": TOKENS + 1}])
def test_dense_is_sdpa_bit_for_bit(options: dict[str, Any]) -> None:
    model = llama()
    expected = model(IDS).logits
    block_sparse(model, **{"block": BLOCK, "dense_below": 0, **options})
    assert torch.equal(model(IDS).logits, expected)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("dense_below", [0, 1000])
@pytest.mark.parametrize("pattern", ["topk", "local_global"])
def test_padded_rows_are_what_they_are_alone(pattern: str, dense_below: int) -> None:
    model = block_sparse(llama(), pattern, 0.4, BLOCK, dense_below)
    mask = torch.ones_like(IDS)
    mask[0, :37] = 0
    mask[1, -21:] = 0
    both = model(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    for row, tokens in ((0, slice(37, None)), (1, slice(0, TOKENS - 21))):
        alone = model(IDS[row : row + 1, tokens]).logits
        torch.testing.assert_close(both[row : row + 1, tokens], alone, rtol=1e-4, atol=1e-5)


def test_top_blocks_differ_by_head_and_matter() -> None:
    model = llama()
    dense = model(IDS).logits
    errors = []
    for density in (0.2, 0.6, 0.9):
        block_sparse(model, "topk", density, BLOCK, 0)
        errors.append(float((model(IDS).logits - dense).norm()))
    assert errors[0] > errors[1] > errors[2] > 0


def test_a_prompt_in_pieces() -> None:
    """The second piece sees the first through the cache; blocks are counted from the first token on."""
    model = llama()
    first = 40
    cache = tf.DynamicCache(config=model.config)
    model(IDS[:1, :first], past_key_values=cache)
    mask = layout_as_mask("local_global", TOKENS - first, TOKENS, 0.4)
    expected = model(IDS[:1, first:], past_key_values=cache, attention_mask=mask).logits
    block_sparse(model, "local_global", 0.4, BLOCK, 50)  # dense for the first piece
    cache = tf.DynamicCache(config=model.config)
    model(IDS[:1, :first], past_key_values=cache)
    got = model(IDS[:1, first:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_with_padding(cache: str | None) -> None:
    model = llama()
    mask = torch.ones_like(IDS)
    mask[0, :37] = 0
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    if cache:
        options |= {"cache_implementation": cache, "disable_compile": True}
    expected = model.generate(IDS, **options)
    block_sparse(model, "dense", 1.0, BLOCK, 0)
    assert torch.equal(model.generate(IDS, **options), expected)
    block_sparse(model, "topk", 0.5, BLOCK, 0)
    both = model.generate(IDS, **options)
    del options["attention_mask"]
    assert torch.equal(model.generate(IDS[1:], **options), both[1:])
    assert torch.equal(model.generate(IDS[:1, 37:], **options), both[:1, 37:])


def test_sliding_layers_are_untouched() -> None:
    torch.manual_seed(0)
    config = tf.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    )
    model = tf.Gemma3ForCausalLM(config).eval()
    mask = torch.ones_like(IDS)
    mask[0, :37] = 0
    expected = model(IDS, attention_mask=mask).logits
    block_sparse(model, "local", 0.1, BLOCK, 0, layers={1: None})
    got = model(IDS, attention_mask=mask).logits
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0, 37:], expected[0, 37:])
    block_sparse(model, "local", 0.1, BLOCK, 0)
    assert not torch.allclose(model(IDS, attention_mask=mask).logits[1], expected[1], atol=1e-4)


def test_layers_have_settings_of_their_own() -> None:
    model = llama()
    block_sparse(model, "local", 0.2, BLOCK, 0, layers={0: BlockSparseSpec("local", 0.5, BLOCK, 0)})
    assert [getattr(layer.self_attn, integration.ATTRIBUTE).density for layer in model.model.layers] == [0.5, 0.2]
    with pytest.raises(AttentionError, match=r"layers: expected indices of the model's layers, got \[7\]"):
        block_sparse(model, layers={7: None})


def test_by_name_it_has_default_settings() -> None:
    config = tf.LlamaConfig(**SIZES)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=integration.NAME).eval()
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)  # fewer than 4096 tokens


def test_an_encoder_stays_dense() -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    model = tf.BertModel(config).eval()
    expected = model(IDS).last_hidden_state
    model.set_attn_implementation(integration.NAME)
    for module in model.modules():
        setattr(module, integration.ATTRIBUTE, BlockSparseSpec("local", 0.1, BLOCK, 0))
    assert torch.equal(model(IDS).last_hidden_state, expected)


def test_gradients_flow() -> None:
    model = block_sparse(llama(), "topk", 0.5, BLOCK, 0)
    with torch.enable_grad():
        model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "diagonal"}, "expected one of dense, local"),
        ({"density": 0}, "more than 0 and at most 1, got 0"),
        ({"density": 1.5}, "more than 0 and at most 1, got 1.5"),
        ({"block": 100}, "a power of two from 16 tokens on, got 100"),
        ({"dense_below": -1}, "expected 0 or more tokens, got -1"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        block_sparse(llama(), **settings)


def test_masks_that_cannot_be_honoured() -> None:
    model = block_sparse(llama(), "local", 0.5, BLOCK, 0)
    with pytest.raises(AttentionError, match=r"got a mask \(1, 1, 150, 150\)"):
        model(IDS, attention_mask=torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool))
    mask = torch.ones_like(IDS)
    mask[1, 20:30] = 0
    with pytest.raises(AttentionError, match="holes in the mask of row 1"):
        model(IDS, attention_mask=mask)
    positions = torch.cat([torch.arange(70), torch.arange(80)])[None]
    with pytest.raises(AttentionError, match="packed sequences"):
        model(IDS[:1], position_ids=positions, use_cache=False)
    block_sparse(model, "local", 0.5, BLOCK, TOKENS + 1)
    model(IDS, attention_mask=mask)  # dense honours everything


def test_attention_that_is_more_than_softmax() -> None:
    module = torch.nn.Module()
    q = torch.zeros(1, 2, 8, 16)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(AttentionError, match=f"has no {name}"):
            integration.block_sparse_attention(module, q, q, q, None, **{name: 1.0})
    setattr(module, integration.ATTRIBUTE, BlockSparseSpec("local", 0.5, 16, 0))
    long = torch.zeros(1, 2, 32, 16)
    with pytest.raises(AttentionError, match=r"no dropout, got 0\.1"):
        integration.block_sparse_attention(module, long, long, long, None, dropout=0.1)


@pytest.mark.parametrize("settings", [{"residual": None}, {"k_bits": 8, "v_bits": 8, "group": 32, "residual": 32}])
def test_a_quantized_cache_after_block_sparse_prefill(settings: dict[str, Any]) -> None:
    model = block_sparse(llama(), "local_global", 0.4, BLOCK, 0)
    mask = torch.ones_like(IDS)
    mask[0, :37] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(IDS, attention_mask=mask, **options)
    cache = bitforbit.kivi_cache(model, v_group=16, **settings)
    assert model.config._attn_implementation == integration.NAME
    got = model.generate(IDS, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(got.logits[0], expected.logits[0])  # the prompt's own tokens are exact
    if settings["residual"] is None:
        assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits[1:3]), torch.stack(expected.logits[1:3]), rtol=0, atol=0.02)
    alone = bitforbit.kivi_cache(model, v_group=16, **settings)
    model(IDS[:1, 37:], past_key_values=alone)
    padded = bitforbit.kivi_cache(model, v_group=16, **settings)
    model(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=padded)
    assert padded.layers[0].state.starts == (37, 0)
    assert alone.layers[0].state.starts == (0,)
