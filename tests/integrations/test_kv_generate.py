"""``generate`` with a quantized cache: every way of generating, every kind of model."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

import bitforbit
from bitforbit import ops
from bitforbit.integrations.transformers.kv import NAME
from bitforbit.kv import KiviCache, KiviSpec
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from integrations.kv_models import ARCHITECTURES, make, prompts

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
SMALL: dict[str, Any] = {"k_bits": 8, "v_bits": 8, "residual": 32}


@pytest.fixture(scope="module")
def llama() -> Any:
    return make()


def written(model: Any, inputs: dict[str, torch.Tensor], cache: Any = None, **options: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(**inputs, past_key_values=cache, **{**GREEDY, **options})
    return out[:, inputs["input_ids"].shape[1] :]


# --- everything exact: the model's own cache, token for token -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unlimited_window_is_the_models_own_cache(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    inputs = prompts(3, 37, padding=(11, 5))
    if name not in ("gemma2", "gpt_oss"):  # whose eager attention rounds at other places
        reference = written(model, inputs)
    else:
        bitforbit.kivi_cache(model)
        reference = written(model, inputs)
    cache = bitforbit.kivi_cache(model, residual=None)
    assert torch.equal(written(model, inputs, cache), reference)
    assert cache.get_seq_length() == 37 + 23


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_are_those_of_eager_attention(name: str) -> None:
    model = make(name)
    inputs = prompts(3, 37, padding=(11, 5))
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[mask]
        cache = bitforbit.kivi_cache(model, residual=None)
        got = model(**inputs, past_key_values=cache).logits[mask]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        expected = make(name)(**inputs).logits[:, -1]
        cache = bitforbit.kivi_cache(model, k_bits=8, v_bits=8, residual=32)
        got = model(**inputs, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_steps_through_quantized_tokens_are_near_a_prompt_read_at_once(name: str) -> None:
    model = make(name)
    inputs = prompts(2, 100, padding=(9,))
    cache = bitforbit.kivi_cache(model, **SMALL)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        begin = {key: value[:, :90] for key, value in inputs.items()}
        model(**begin, past_key_values=cache)
        for n in range(90, 100):
            got = model(
                inputs["input_ids"][:, n : n + 1],
                attention_mask=inputs["attention_mask"][:, : n + 1],
                past_key_values=cache,
            ).logits[:, -1]
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    assert not torch.equal(got, expected)


# --- quantized ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_dimensions_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    model = make("llama", dtype, head_dim=head_dim)
    inputs = prompts(2, 70, padding=(6,))
    cache = bitforbit.kivi_cache(model, residual=32)
    written(model, inputs, cache, max_new_tokens=4)
    state = cache.layers[1].state
    assert (state.head_dim, state.dtype) == (head_dim, dtype)
    assert cache.layers[1].spec.value_group == (16 if head_dim == 80 else 32)
    exact = model.generate(**inputs, **GREEDY, return_dict_in_generate=True).past_key_values.layers[0]
    keys, values = cache.layers[0].state.dequantized()
    seen = inputs["attention_mask"][:, None, :, None].bool()
    for got, expected in ((keys, exact.keys), (values, exact.values)):
        difference = ((got[:, :, :70] - expected[:, :, :70].float()) * seen).abs().max()
        assert 0 < difference < 0.2 * expected.abs().max()


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, 2), (2, 2)])
def test_a_padded_row_is_that_row_alone(llama: Any, bits: tuple[int, int]) -> None:
    inputs = prompts(3, 61, padding=(29, 7))
    settings = {"k_bits": bits[0], "v_bits": bits[1], "residual": 32}
    together = written(llama, inputs, bitforbit.kivi_cache(llama, **settings))
    for row, padding in enumerate((29, 7, 0)):
        alone = {key: value[row : row + 1, padding:] for key, value in inputs.items()}
        assert torch.equal(written(llama, alone, bitforbit.kivi_cache(llama, **settings))[0], together[row])


def test_memory_is_less_and_is_counted(llama: Any) -> None:
    from bitforbit.integrations.transformers.kv import figures

    inputs = prompts(2, 400)
    own = llama.generate(**inputs, **GREEDY, return_dict_in_generate=True).past_key_values
    cache = bitforbit.kivi_cache(llama, residual=32)
    written(llama, inputs, cache)
    exact, packed = figures(own), figures(cache)
    elements = 2 * 2 * 2 * 32 * 423 * 2  # rows, heads, channels, tokens, layers; keys and values
    assert exact.elements == packed.elements == elements
    assert exact.bits_per_element == 32
    assert packed.num_bytes == cache.nbytes < exact.num_bytes / 3
    assert packed.tokens == 423
    assert packed.bytes_per_token == cache.nbytes / (2 * 423)
    assert (packed.quantized_layers, exact.quantized_layers) == (2, 0)


# --- ways of generating ---------------------------------------------------------------------------------------------


def test_beams(llama: Any) -> None:
    inputs = prompts(2, 45, padding=(9,))
    options = {"num_beams": 3, "num_return_sequences": 2}
    reference = written(llama, inputs, **options)
    assert torch.equal(written(llama, inputs, bitforbit.kivi_cache(llama, residual=None), **options), reference)
    cache = bitforbit.kivi_cache(llama, **SMALL)
    first = written(llama, inputs, cache, **options)
    assert cache.batch_size == 6
    assert torch.equal(first, written(llama, inputs, bitforbit.kivi_cache(llama, **SMALL), **options))


def test_sampling_several_sequences(llama: Any) -> None:
    inputs = prompts(1, 45)
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(3)
    reference = written(llama, inputs, **options)
    torch.manual_seed(3)
    assert torch.equal(written(llama, inputs, bitforbit.kivi_cache(llama, residual=None), **options), reference)


@pytest.mark.parametrize("way", ["prompt_lookup", "assistant"])
def test_drafted_tokens(llama: Any, way: str) -> None:
    inputs = prompts(1, 20)
    inputs = {key: value.repeat(1, 3) for key, value in inputs.items()}  # something to look up
    drafts: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if way == "assistant":
        drafts = {"assistant_model": make("llama", num_hidden_layers=1)}
    reference = written(llama, inputs)
    assert torch.equal(written(llama, inputs, bitforbit.kivi_cache(llama, residual=None), **drafts), reference)
    cache = bitforbit.kivi_cache(llama, **SMALL)
    out = written(llama, inputs, cache, **drafts)
    assert out.shape == reference.shape
    assert cache.get_seq_length() in (60 + 23, 60 + 24)


def test_drafts_that_are_taken_back_leave_no_trace(llama: Any) -> None:
    inputs = prompts(1, 60)
    steps = prompts(1, 5)["input_ids"]
    kept, cropped = bitforbit.kivi_cache(llama, **SMALL), bitforbit.kivi_cache(llama, **SMALL)
    with torch.no_grad():
        for cache in (kept, cropped):
            llama(**inputs, past_key_values=cache)
            cache.activate_past_recording()
        llama(steps, past_key_values=cropped)
        cropped.crop(-3)
        llama(steps[:, :2], past_key_values=kept)
        kept.crop(0)
    assert kept.get_seq_length() == cropped.get_seq_length() == 62
    for one, other in zip(kept.layers, cropped.layers, strict=True):
        for a, b in zip(one.state.dequantized(), other.state.dequantized(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", [None, 32])
def test_a_prompt_in_chunks(llama: Any, residual: int | None) -> None:
    inputs = prompts(2, 75, padding=(41,))
    reference = written(llama, inputs)
    cache = bitforbit.kivi_cache(llama, k_bits=8, v_bits=8, residual=residual)
    out = written(llama, inputs, cache, prefill_chunk_size=32)
    if residual is None:
        assert torch.equal(out, reference)
    else:
        assert cache.layers[0].state.start.tolist() == [41, 0]


def test_continued(llama: Any) -> None:
    inputs = prompts(1, 50)
    cache = bitforbit.kivi_cache(llama, residual=None)
    own = llama.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    first = llama.generate(**inputs, past_key_values=cache, **GREEDY)
    more = torch.cat([first, prompts(1, 9)["input_ids"]], 1)
    assert torch.equal(
        llama.generate(more, past_key_values=cache, **GREEDY),
        llama.generate(more, past_key_values=own.past_key_values, **GREEDY),
    )
    cache = bitforbit.kivi_cache(llama, **SMALL)
    first = llama.generate(**inputs, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 73
    llama.generate(torch.cat([first, first], 1), past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 2 * 74 + 23


@pytest.mark.parametrize("how", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_prefix_is_read_once_and_copied(llama: Any, how: Any) -> None:
    prefix, rest = prompts(1, 80), prompts(1, 7)["input_ids"]
    cache = bitforbit.kivi_cache(llama, **SMALL)
    with torch.no_grad():
        llama(**prefix, past_key_values=cache)
    whole = torch.cat([prefix["input_ids"], rest], 1)
    outs = [llama.generate(whole, past_key_values=how(cache), **GREEDY) for _ in range(2)]
    assert torch.equal(*outs)
    assert cache.get_seq_length() == 80


@pytest.mark.parametrize("residual", [None, 32])
def test_autocast(llama: Any, residual: int | None) -> None:
    inputs = prompts(2, 40, padding=(3,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = written(llama, inputs)
        cache = bitforbit.kivi_cache(llama, k_bits=8, v_bits=8, residual=residual)
        out = written(llama, inputs, cache)
    assert cache.layers[0].state.dtype == torch.float32
    assert torch.equal(out, reference) or residual is not None


def test_one_token_of_prompt(llama: Any) -> None:
    inputs = prompts(2, 1)
    assert torch.equal(written(llama, inputs, bitforbit.kivi_cache(llama, residual=None)), written(llama, inputs))
    written(llama, inputs, bitforbit.kivi_cache(llama, **SMALL))


def test_embeddings_and_four_dimensional_masks(llama: Any) -> None:
    inputs = prompts(2, 40)
    embeddings = llama.get_input_embeddings()(inputs["input_ids"]).detach()
    cache = bitforbit.kivi_cache(llama, residual=None)
    out = llama.generate(inputs_embeds=embeddings, past_key_values=cache, **GREEDY)
    assert torch.equal(out, llama.generate(inputs_embeds=embeddings, **GREEDY))
    # A mask with a hole, as bools and as numbers to add.
    results = []
    for mask in (torch.ones(2, 1, 1, 41, dtype=torch.bool), torch.zeros(2, 1, 1, 41)):
        mask[..., 10] = False if mask.dtype == torch.bool else torch.finfo(torch.float32).min
        cache = bitforbit.kivi_cache(llama, **SMALL)
        with torch.no_grad():
            llama(**inputs, past_key_values=cache)
            results.append(llama(torch.full((2, 1), 5), attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_a_mask_of_ones_own_is_not_padding(llama: Any) -> None:
    """Two documents in one row, then a query that sees both."""
    ids = prompts(1, 80)["input_ids"]
    mask = torch.ones(80, 80, dtype=torch.bool).tril()
    mask[50:, :50] = False
    logits = []
    for cache in (DynamicCache(config=llama.config), bitforbit.kivi_cache(llama, **SMALL)):
        with torch.no_grad():
            llama(ids, attention_mask=mask[None, None], past_key_values=cache)
            logits.append(llama(ids[:, :1], past_key_values=cache).logits)
    assert cache.layers[0].state.start.tolist() == [0]
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


def test_exceptions_by_layer(llama: Any) -> None:
    cache = bitforbit.kivi_cache(llama, residual=32, layers={0: None, 1: KiviSpec(2, 2, residual=64)})
    assert cache.quantized_layers == [1]
    assert cache.layers[1].spec == KiviSpec(2, 2, residual=64)
    written(llama, prompts(1, 150), cache)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "KiviLayer"]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
def test_windowed_layers_stay_transformers_own(name: str) -> None:
    model = make(name)
    cache = bitforbit.kivi_cache(model, **SMALL)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "KiviLayer"]
    assert cache.is_sliding == [True, False]
    written(model, prompts(2, 60, padding=(5,)), cache)


def test_other_caches_under_this_attention(llama: Any) -> None:
    inputs = prompts(2, 40, padding=(3,))
    model = make()
    reference = written(model, inputs)
    bitforbit.kivi_cache(model)
    assert torch.equal(written(model, inputs), reference)
    assert torch.equal(written(model, inputs, cache_implementation="static"), reference)


def test_compressed_and_wrapped_models(tmp_path: Path) -> None:
    inputs = prompts(2, 60, padding=(7,))
    plain, compressed = make("llama", torch.bfloat16), bitforbit.compress_model(make("llama", torch.bfloat16))
    reference = written(plain, inputs, bitforbit.kivi_cache(plain, **SMALL))
    assert torch.equal(written(compressed, inputs, bitforbit.kivi_cache(compressed, **SMALL)), reference)
    plain.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.config._attn_implementation == "sdpa"  # not a property of the weights
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=NAME)
    assert torch.equal(written(loaded, inputs, KiviCache(loaded.config, **SMALL)), reference)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["v_proj"], r=2)).eval()
    assert torch.equal(written(adapted, inputs, bitforbit.kivi_cache(adapted, **SMALL)), reference)


@pytest.mark.slow
def test_cudas_kernels_write_the_same() -> None:
    """In the emulation: the same tokens and the same packed bytes as on the CPU."""
    model = make("llama", torch.bfloat16, num_hidden_layers=1)
    inputs = prompts(2, 68, padding=(9,))
    caches, outs = [], []
    launcher = EmulatedLauncher(seed=1)
    for where in (nullcontext(), ops.gpu.emulate(EmulatedQueue(launcher))):
        with where:
            caches.append(bitforbit.kivi_cache(model, residual=32))
            outs.append(written(model, inputs, caches[-1], max_new_tokens=3))
    assert torch.equal(*outs)
    assert {"kv_flush", "kv_attend", "kv_merge"} <= {name for name, _ in launcher.launches}
    for packed, expected in zip(*(cache.layers[0].state.segments for cache in caches), strict=True):
        assert torch.equal(packed, expected)


@pytest.mark.slow
def test_compiled_model() -> None:
    model = make("llama", num_hidden_layers=1)
    inputs = prompts(1, 40)
    reference = written(model, inputs, bitforbit.kivi_cache(model, **SMALL), max_new_tokens=3)
    cache = bitforbit.kivi_cache(model, **SMALL)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(written(model, inputs, cache, max_new_tokens=3), reference)
    torch._dynamo.reset()
