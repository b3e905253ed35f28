"""Tiny models of transformers: outputs, generation, adapters of peft, all with the bits of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bitforbit
from bitforbit import nn as bnn
from torch_helpers import assert_same_bits

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 512,
}


def build(auto: str, config: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    made = getattr(transformers, config)(**changes)
    return getattr(transformers, auto).from_config(made).to(torch.bfloat16).eval()


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: build("AutoModelForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=2),
    "llama tied": lambda: build("AutoModelForCausalLM", "LlamaConfig", **SMALL, tie_word_embeddings=True),
    "gemma3": lambda: build("AutoModelForCausalLM", "Gemma3TextConfig", **SMALL, num_key_value_heads=2, head_dim=16),
    "gpt2": lambda: build("AutoModelForCausalLM", "GPT2Config", n_embd=64, n_layer=2, n_head=4, vocab_size=512),
    "mixtral": lambda: build(
        "AutoModelForCausalLM", "MixtralConfig", **SMALL, num_key_value_heads=2, num_local_experts=4
    ),
}

IDS = torch.tensor([[1, 5, 9, 200, 511, 3], [7, 7, 8, 100, 101, 102]])


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_and_generation(name):
    plain = CAUSAL[name]()
    model = bitforbit.compress_model(copy.deepcopy(plain))
    assert bnn.compressed_size(model).ratio < 0.8
    with torch.no_grad():
        assert_same_bits(model(IDS).logits, plain(IDS).logits)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **arguments), plain.generate(IDS, **arguments))
    if name == "llama tied":
        assert model.lm_head.code__weight is model.model.embed_tokens.code__weight


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts(implementation):
    plain = CAUSAL["mixtral"]()
    model = bitforbit.compress_model(copy.deepcopy(plain))
    experts = [m for m in model.modules() if "up" in " ".join(bnn.compressed_parameters(m))]
    assert len(experts) == 2
    with torch.no_grad():
        for m in (model, plain):
            m.set_experts_implementation(implementation)
        assert_same_bits(model(IDS).logits, plain(IDS).logits)


def test_encoder_decoder():
    """T5 reads the dtype of a weight in every forward."""
    plain = build(
        "AutoModelForSeq2SeqLM", "T5Config", d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4, vocab_size=512
    )
    model = bitforbit.compress_model(copy.deepcopy(plain))
    with torch.no_grad():
        results = [m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, plain)]
    assert_same_bits(*results)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_with_the_same_bits(checkpointing):
    peft = pytest.importorskip("peft")
    histories = []
    for compressed in (True, False):
        model = CAUSAL["llama"]()
        if compressed:
            bitforbit.compress_model(model)
        config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights="gaussian")
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # As peft's examples do: all parameters are handed over, the frozen ones have no gradient.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        history = []
        for _ in range(3):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            history.append(loss.detach())
            history += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        histories.append(history)
    assert len(histories[0]) > 40
    for got, expected in zip(*histories, strict=True):
        assert_same_bits(got, expected)


def test_merging_an_adapter_is_refused_not_lost():
    peft = pytest.importorskip("peft")
    model = bitforbit.compress_model(CAUSAL["llama"]())
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        before = model(IDS).logits
        with pytest.raises(bitforbit.errors.CompressedParameterError, match="decompress"):
            model.merge_and_unload()
        assert_same_bits(model(IDS).logits, before)
        bitforbit.decompress_model(model)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, before, atol=0.05, rtol=0.05)
