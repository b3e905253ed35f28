"""Official DFloat11 directories, transcoded as they load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf

import bitforbit
from bitforbit import BitforbitConfig, errors
from bitforbit.nn import compressed_parameters
from integrations import zoo
from integrations.conftest import Directories


@pytest.fixture(params=["llama", "llama-tied", "qwen3", "gemma3", "qwen2-vl", "llava"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(plain: Path, df11: Path) -> Path:
    bitforbit.compress(plain, df11, format="df11")
    return df11


def test_outputs_and_weights(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    df11 = write(plain, tmp_path / "df11")
    assert not (df11 / "bitforbit.json").exists()
    auto = zoo.auto_class(name)
    model, expected = auto.from_pretrained(df11, quantization_config=BitforbitConfig()), auto.from_pretrained(plain)
    assert torch.equal(zoo.logits(model, name, 2), zoo.logits(expected, name, 2))
    again = auto.from_pretrained(native)
    for (prefix, module), (_, other) in zip(model.named_modules(), again.named_modules(), strict=True):
        assert compressed_parameters(module) == compressed_parameters(other), prefix
    for (key, value), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(value, other), key


def test_units_that_transformers_converts(directories: Directories, tmp_path: Path) -> None:
    df11 = write(directories("mixtral")[0], tmp_path / "df11")
    with pytest.raises(errors.UsageError, match=r"experts\.0\.w1\.weight: transformers merges"):
        tf.AutoModelForCausalLM.from_pretrained(df11, quantization_config=BitforbitConfig())


def test_saved_as_a_native_directory(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    df11 = write(plain, tmp_path / "df11")
    model = tf.AutoModelForCausalLM.from_pretrained(df11, quantization_config=BitforbitConfig())
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "dfloat11_config" not in config
    assert config["quantization_config"]["quant_method"] == "bitforbit"
    bitforbit.decompress(tmp_path / "saved", tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_a_missing_unit(directories: Directories, tmp_path: Path) -> None:
    df11 = write(directories("llama")[0], tmp_path / "df11")
    (df11 / "model_layers_1.safetensors").unlink()
    with pytest.raises(errors.MissingTensorError, match=r"model\.layers\.1"):
        tf.AutoModelForCausalLM.from_pretrained(df11, quantization_config=BitforbitConfig())


def test_only_the_remainder_was_fetched(directories: Directories, tmp_path: Path) -> None:
    """As from_pretrained does with a DFloat11 model on the Hub."""
    df11 = write(directories("llama")[0], tmp_path / "df11")
    (tmp_path / "part").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(df11 / name, tmp_path / "part")
    with pytest.raises(errors.MissingPartError, match="snapshot_download"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "part", quantization_config=BitforbitConfig())


def test_damaged_unit(directories: Directories, tmp_path: Path) -> None:
    from integrations.test_refusals import flip

    df11 = write(directories("llama")[0], tmp_path / "df11")
    flip(df11 / "model_layers_1.safetensors", "model.layers.1.luts")
    with pytest.raises(errors.Df11FormatError):
        tf.AutoModelForCausalLM.from_pretrained(df11, quantization_config=BitforbitConfig())


def test_offloaded(directories: Directories, tmp_path: Path) -> None:
    from integrations.test_offload import maps

    plain, _ = directories("llama")
    df11 = write(plain, tmp_path / "df11")
    model = tf.AutoModelForCausalLM.from_pretrained(
        df11, quantization_config=BitforbitConfig(), device_map=maps("llama"), offload_folder=str(tmp_path / "offload")
    )
    expected = tf.AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(zoo.logits(model, "llama", 1), zoo.logits(expected, "llama", 1))
