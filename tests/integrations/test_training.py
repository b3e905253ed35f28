"""Adapters train over a compressed base; the base itself does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import bitforbit
from bitforbit.nn import Compressed
from integrations import zoo
from integrations.conftest import Directories

peft = pytest.importorskip("peft")


def lora(**kwargs: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_alpha=8, task_type="CAUSAL_LM", **kwargs)


def steps(model: Any) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = zoo.inputs("llama", 2)["input_ids"]
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lora_trains_as_over_the_plain_model(directories: Directories, tmp_path: Path) -> None:
    plain, native = directories("llama")
    results = []
    for directory in (plain, native):
        torch.manual_seed(0)
        model = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(directory), lora())
        results.append((steps(model), {k: v.detach().clone() for k, v in model.named_parameters() if "lora_" in k}))
        model.save_pretrained(tmp_path / directory.name)
    (losses, weights), (compressed_losses, compressed_weights) = results
    assert losses == compressed_losses
    assert losses[-1] < losses[0]
    for key, value in weights.items():
        assert torch.equal(value, compressed_weights[key]), key
    assert not list((tmp_path / native.name).glob("model*.safetensors"))
    assert (tmp_path / native.name / "adapter_model.safetensors").exists()
    base = tf.AutoModelForCausalLM.from_pretrained(native)
    again = peft.PeftModel.from_pretrained(base, tmp_path / native.name)
    assert torch.equal(zoo.logits(again, "llama", 1), zoo.logits(model.eval(), "llama", 1))


def test_adapters_of_transformers(directories: Directories, tmp_path: Path) -> None:
    _, native = directories("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(native)
    model.add_adapter(lora(init_lora_weights=False), adapter_name="one")
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = tf.AutoModelForCausalLM.from_pretrained(native)
    again.load_adapter(str(tmp_path), adapter_name="one")
    assert torch.equal(zoo.logits(again, "llama", 1), zoo.logits(model, "llama", 1))


def test_from_pretrained_of_an_adapter_directory(directories: Directories, tmp_path: Path) -> None:
    """adapter_config.json names the compressed base; transformers loads both."""
    _, native = directories("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(native)
    model.add_adapter(lora(init_lora_weights=False, base_model_name_or_path=str(native)), adapter_name="default")
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.model.layers[0].mlp.down_proj, Compressed)
    assert torch.equal(zoo.logits(again, "llama", 1), zoo.logits(model, "llama", 1))


def trainer(model: Any, directory: Path) -> Any:
    class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.arange(8) + index
            return {"input_ids": ids, "labels": ids}

    arguments = tf.TrainingArguments(
        str(directory), max_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=2, save_strategy="no"
    )
    return tf.Trainer(model, arguments, train_dataset=Data())


def test_full_fine_tuning_is_refused(directories: Directories, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1])
    with pytest.raises(ValueError, match="adapters"):
        trainer(model, tmp_path)
    with pytest.raises(bitforbit.errors.UsageError, match="frozen"):
        model.lm_head.requires_grad_(True)


def test_the_trainer_trains_adapters(directories: Directories, tmp_path: Path) -> None:
    model = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1]), lora())
    job = trainer(model, tmp_path)
    job.train()
    job.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
