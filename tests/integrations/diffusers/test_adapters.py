"""LoRA on compressed models: the plain model's bits, forward and backward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict

from bitforbit.errors import CompressedParameterError
from integrations.diffusers import zoo
from integrations.diffusers.conftest import Directories


def adapted(directory: Path, targets: list[str]) -> torch.nn.Module:
    model = AutoModel.from_pretrained(str(directory), dtype=torch.bfloat16)
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model


def test_an_adapter_is_saved_loaded_and_removed(made: Directories, tmp_path: Path) -> None:
    plain, compressed = made("flux")
    model = adapted(compressed, ["to_q", "to_k", "norm_out.linear"])
    expected = zoo.outputs("flux", adapted(plain, ["to_q", "to_k", "norm_out.linear"]))
    assert torch.equal(zoo.outputs("flux", model), expected)
    model.save_lora_adapter(str(tmp_path))
    again = AutoModel.from_pretrained(str(compressed), dtype=torch.bfloat16)
    before = zoo.outputs("flux", again)
    again.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    assert torch.equal(zoo.outputs("flux", again), expected)
    assert not torch.equal(expected, before)
    again.unload_lora()
    assert torch.equal(zoo.outputs("flux", again), before)
    with pytest.raises(CompressedParameterError, match="decompress the module first"):
        model.fuse_lora()


def test_gradients(made: Directories) -> None:
    gradients = []
    for directory in made("unet"):
        model = adapted(directory, ["to_q", "to_v", "conv1", "proj_in"]).train()
        model.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(0)
        sample, states = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 4, 8, 8), (1, 4, 32)))
        model(sample, 1, states).sample.square().sum().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("conv1" in name for name in gradients[0])
    for name, expected in gradients[0].items():
        assert expected is not None
        assert torch.equal(gradients[1][name], expected), name


def test_pipelines(made: Directories, tmp_path: Path) -> None:
    lora = get_peft_model_state_dict(adapted(made("flux")[0], ["to_q", "to_k"]))
    FluxPipeline.save_lora_weights(str(tmp_path), transformer_lora_layers=lora)
    plain, ours = (DiffusionPipeline.from_pretrained(each, dtype=torch.bfloat16) for each in made("fluxes"))
    before = zoo.image(ours)
    for pipeline in (plain, ours):
        pipeline.load_lora_weights(str(tmp_path), adapter_name="first")
        pipeline.load_lora_weights(str(tmp_path), adapter_name="second")
        pipeline.set_adapters(["first", "second"], [1.0, 0.5])
    changed = zoo.image(ours)
    assert np.array_equal(changed, zoo.image(plain))
    assert not np.array_equal(changed, before)
    ours.unload_lora_weights()
    assert np.array_equal(zoo.image(ours), before)


def test_an_adapter_that_widens_a_layer(made: Directories) -> None:
    """As those for control images do: that layer becomes a plain one."""
    generator = torch.Generator().manual_seed(0)
    lora = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 32, generator=generator).bfloat16(),
        "transformer.x_embedder.lora_B.weight": torch.randn(32, 2, generator=generator).bfloat16(),
    }
    results = []
    for directory in made("fluxes"):
        pipeline = DiffusionPipeline.from_pretrained(directory, dtype=torch.bfloat16)
        pipeline.load_lora_weights(dict(lora))
        with torch.no_grad():
            results.append(pipeline.transformer.x_embedder(torch.ones(1, 4, 32).bfloat16()))
    assert torch.equal(*results)
