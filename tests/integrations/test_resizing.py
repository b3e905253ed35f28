"""New tokens: the embedding and the head get more rows, and stay compressed and tied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

import bitforbit
from bitforbit.nn import compressed_parameters
from integrations import zoo
from integrations.conftest import Directories


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_resize_token_embeddings(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    expected, model = (tf.AutoModelForCausalLM.from_pretrained(directory) for directory in (plain, native))
    rows = model.config.vocab_size + 5
    for each in (expected, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(rows)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    assert all(compressed_parameters(end)["weight"].shape[0] == rows for end in ends)
    assert (ends[0].digits__weight is ends[1].digits__weight) is (name == "llama-tied")
    assert torch.equal(zoo.logits(model, name, 1), zoo.logits(expected, name, 1))
    model.save_pretrained(tmp_path)
    assert bitforbit.verify(tmp_path).ok
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(zoo.logits(again, name, 1), zoo.logits(expected, name, 1))
    model.dequantize()
    assert "resize_token_embeddings" not in vars(model)
    assert torch.equal(zoo.logits(model, name, 1), zoo.logits(expected, name, 1))
