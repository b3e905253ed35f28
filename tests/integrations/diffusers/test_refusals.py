"""What cannot be loaded or saved, and what is said about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, FluxTransformer2DModel, QuantoConfig
from safetensors.torch import load_file, save_file

import bitforbit
from bitforbit.errors import (
    ChecksumError,
    MissingPartError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedVersionError,
    UsageError,
)
from bitforbit.format.layout import open_shard
from bitforbit.integrations.diffusers.config import BitforbitConfig
from integrations.diffusers.conftest import Directories

WEIGHTS = "diffusion_pytorch_model.safetensors"
LINEAR = "norm_out.linear.weight"


def load(directory: Path, **options: Any) -> torch.nn.Module:
    return AutoModel.from_pretrained(str(directory), **{"dtype": torch.bfloat16, **options})


def change_config(directory: Path, **members: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))


@pytest.fixture
def compressed(made: Directories, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("flux")[1], tmp_path / "compressed"))


def recompressed(plain: Path, root: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The model with other tensors."""
    shutil.copytree(plain, root / "changed")
    save_file(tensors, root / "changed" / WEIGHTS, {"format": "pt"})
    bitforbit.compress(root / "changed", root / "other", threads=1)
    return root / "other"


def test_other_quantizations(made: Directories) -> None:
    with pytest.raises(UsageError, match=r"expected a BitforbitConfig or none.* decompress"):
        load(made("flux")[1], quantization_config=QuantoConfig("int8"))


def test_checkpoints_of_other_quantizations(made: Directories, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made("flux")[0], tmp_path / "src"))
    change_config(source, quantization_config={"quant_method": "quanto", "weights_dtype": "int8"})
    with pytest.raises(UsageError, match=r"quantized already \(quanto\)"):
        load(source, quantization_config=BitforbitConfig())
    bitforbit.compress(source, tmp_path / "dst", threads=1)
    with pytest.raises(UsageError, match=r"quantized \(quanto\) before it was compressed"):
        load(tmp_path / "dst")


def test_configs_and_weights_that_do_not_belong_together(made: Directories, compressed: Path) -> None:
    plain, _ = made("flux")
    shutil.copy(plain / WEIGHTS, compressed)
    with pytest.raises(UsageError, match=r"expected weights compressed by bitforbit, as config\.json says"):
        load(compressed)


def test_compressed_weights_without_the_member_of_config(made: Directories, compressed: Path) -> None:
    shutil.copy(made("flux")[0] / "config.json", compressed)
    assert load(compressed, quantization_config=BitforbitConfig()).hf_quantizer.pre_quantized


def test_shapes(made: Directories, compressed: Path) -> None:
    change_config(compressed, joint_attention_dim=48)
    with pytest.raises(ShapeMismatchError, match=r"context_embedder.weight': expected shape \[32, 48\].*\[32, 32\]"):
        load(compressed)


def test_missing_tensors(made: Directories, tmp_path: Path) -> None:
    plain, _ = made("flux")
    tensors = load_file(plain / WEIGHTS)
    del tensors[LINEAR]
    with pytest.raises(MissingTensorError, match=LINEAR):
        load(recompressed(plain, tmp_path, tensors))


def test_missing_files(made: Directories, tmp_path: Path) -> None:
    load(made("flux")[1]).save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    name = next(name for name in index["weight_map"] if "__" in name)
    index["weight_map"][name.replace("to_", "no_") + "x"] = index["weight_map"].pop(name)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingPartError):
        load(tmp_path)


def test_damaged_weights(compressed: Path) -> None:
    shard = open_shard(compressed / WEIGHTS)
    data = bytearray((compressed / WEIGHTS).read_bytes())
    data[shard.header.data_start + shard.begin[LINEAR]] ^= 1
    (compressed / WEIGHTS).write_bytes(data)
    with pytest.raises(ChecksumError, match=LINEAR):
        load(compressed)
    assert load(compressed, quantization_config=BitforbitConfig(verify=False)) is not None


def test_newer_formats(compressed: Path) -> None:
    change_config(compressed, quantization_config={"quant_method": "bitforbit", "format_version": 99})
    with pytest.raises(UnsupportedVersionError, match="99"):
        load(compressed)


def test_dfloat11(made: Directories, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runtime='df11'"):
        load(made("flux")[1], quantization_config=BitforbitConfig(runtime="df11"))
    source = Path(shutil.copytree(made("flux")[0], tmp_path / "src"))
    tensors = load_file(source / WEIGHTS)
    tensors["norm_out.linear.encoded_exponent"] = tensors.pop(LINEAR).view(torch.uint8)
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    with pytest.raises(UsageError, match=r"a DFloat11 checkpoint.* decompress"):
        load(source, quantization_config=BitforbitConfig())


def test_dtypes_that_nothing_computes_in(made: Directories) -> None:
    with pytest.raises(UsageError, match="expected dtype"):
        load(made("flux")[1], dtype=torch.float8_e4m3fn)


def test_compressed_single_files(made: Directories, compressed: Path) -> None:
    with pytest.raises(UsageError, match="expected an ordinary file for from_single_file"):
        FluxTransformer2DModel.from_single_file(
            str(compressed / WEIGHTS), config=str(made("flux")[0]), quantization_config=BitforbitConfig()
        )


@pytest.mark.parametrize(
    "options", [{"safe_serialization": False}, {"use_flashpack": True}, {"save_function": torch.save}]
)
def test_other_formats(made: Directories, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"to \.safetensors files only"):
        load(made("flux")[1]).save_pretrained(tmp_path, **options)


def test_places_to_save_to(made: Directories, tmp_path: Path) -> None:
    model = load(made("flux")[1])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="got a file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="is saved by its own"):
        type(model).save_pretrained(model, tmp_path / "class")


@pytest.mark.parametrize("options", [{"mode": "best"}, {"bits": 4}, {"threads": 0}, {"modules_to_not_convert": "a"}])
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        BitforbitConfig(**options)
