"""Layers over two GPUs: bits, places of activations and caches, and what does not fit on both."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitforbit
from bitforbit import nn as bnn
from bitforbit.integrations import autoload
from bitforbit.ops import gpu

pytest.importorskip("transformers")
autoload.autoload()

import transformers as tf  # noqa: E402

from integrations import zoo  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="device_map needs accelerate"),
]

Directories = Callable[[str], tuple[Path, Path]]


def halves(name: str) -> dict[str, Any]:
    """A layer on each GPU, and the ends with them."""
    head = {"lm_head": 0 if name == "llama-tied" else 1}
    return {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1,
            **head}  # fmt: skip


def both(name: str, directories: Directories, device_map: Any, **options: Any) -> tuple[Any, Any]:
    """The compressed model and the plain one, split alike."""
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    model = auto.from_pretrained(native, device_map=device_map, **options)
    return model, auto.from_pretrained(plain, device_map=halves(name))


def ids(batch: int = 1, tokens: int = 8) -> torch.Tensor:
    return torch.randint(3, 256, (batch, tokens), generator=torch.Generator().manual_seed(0)).to("cuda:0")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "gemma3"])
def test_bits(name: str, directories: Directories) -> None:
    model, expected = both(name, directories, halves(name))
    places = {part.device.index for part in model.model.layers[1].parameters()}
    assert places == {1}
    with torch.no_grad():
        for tokens in (1, 8):
            got, plain = (each(ids(1, tokens)).logits for each in (model, expected))
            assert torch.equal(got, plain)
    for device in range(2):
        torch.cuda.synchronize(device)
        gpu.check_status(torch.device("cuda", device))


def test_generate_and_caches(directories: Directories) -> None:
    model, expected = both("llama", directories, halves("llama"))
    prompts = ids(2, 12)
    for mode in ("exact", "fused"):
        bnn.set_mode(model, mode)
        cache = tf.DynamicCache(config=model.config)
        options: dict[str, Any] = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 6, "do_sample": False}
        out = model.generate(prompts, past_key_values=cache, **options)
        assert [layer.keys.device.index for layer in cache.layers] == [0, 1]
        if mode == "exact":
            assert torch.equal(out, expected.generate(prompts, **options))
        else:
            assert torch.equal(out, model.generate(prompts, **options))


def test_quantized_caches(directories: Directories) -> None:
    model, _ = both("llama", directories, halves("llama"))
    whole = zoo.auto_class("llama").from_pretrained(directories("llama")[1], device_map={"": 0})
    prompts = ids(2, 40)
    found = []
    for each in (model, whole):
        cache = bitforbit.kivi_cache(each, k_bits=4, v_bits=4, group=32, residual=32)
        found.append(
            each.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False,
                past_key_values=cache,
            )
        )  # fmt: skip
    assert torch.equal(*found)


def test_auto_uses_both(directories: Directories) -> None:
    model, expected = both("llama", directories, "balanced")
    assert set(model.hf_device_map.values()) <= {0, 1}
    assert torch.equal(model(ids()).logits, expected(ids()).logits)


def test_the_rest_is_streamed(directories: Directories) -> None:
    """The last layer and the head are in host memory and run on the first GPU."""
    places = {**halves("llama"), "model.layers.1": "cpu", "model.norm": 1, "lm_head": "cpu"}
    model, _ = both("llama", directories, places)
    whole = zoo.auto_class("llama").from_pretrained(directories("llama")[0], device_map={"": 0})
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(ids()).logits.to(0), whole(ids()).logits)
