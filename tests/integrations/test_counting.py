"""``model.num_parameters``: what the plain model says."""

from __future__ import annotations

from typing import Any

import pytest

from integrations import zoo
from integrations.conftest import Directories

WAYS: list[dict[str, bool]] = [{}, {"exclude_embeddings": True}, {"only_trainable": True}]


def counts(model: Any) -> list[int]:
    return [model.num_parameters(**way) for way in WAYS]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_elements_are_counted(name: str, directories: Directories) -> None:
    plain, native = directories(name)
    expected, model = (zoo.auto_class(name).from_pretrained(directory) for directory in (plain, native))
    everything, without_embeddings, _ = counts(expected)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert counts(model) == [everything, without_embeddings, trainable]
    model.dequantize()
    assert "num_parameters" not in vars(model)
    assert counts(model)[:2] == [everything, without_embeddings]


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_of_a_model_on_disk(name: str, directories: Directories) -> None:
    pytest.importorskip("accelerate")
    plain, native = directories(name)
    ends = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = zoo.auto_class(name).from_pretrained(native, device_map={**ends, **layers})
    assert counts(model)[:2] == counts(zoo.auto_class(name).from_pretrained(plain))[:2]
