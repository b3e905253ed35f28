"""Models: compressed while an ordinary checkpoint loads, saved, loaded again; always with the plain model's bits."""

from __future__ import annotations

import copy
import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import bitforbit
from bitforbit.integrations.diffusers.config import BitforbitConfig
from bitforbit.nn import compressed_parameters
from integrations.diffusers import zoo
from integrations.diffusers.conftest import Directories

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(directory: Path, **options: object) -> torch.nn.Module:
    return AutoModel.from_pretrained(str(directory), **{"dtype": torch.bfloat16, **options})


@pytest.mark.parametrize("name", zoo.MODELS)
def test_outputs_have_the_same_bits(made: Directories, tmp_path: Path, name: str) -> None:
    plain, compressed = made(name)
    model = load(plain)
    expected = zoo.outputs(name, model)
    loaded = load(compressed)
    made_now = load(plain, quantization_config=BitforbitConfig())
    made_now.save_pretrained(tmp_path / "saved")
    for ours in (loaded, made_now, load(tmp_path / "saved")):
        assert zoo.compressed_modules(ours) >= 8
        assert torch.equal(zoo.outputs(name, ours), expected)
        zoo.assert_same_parameters(ours, model)
    # The first has a buffer: those are saved plain. The second wants parts of it in FP32, and is saved like that.
    if name not in ("sd3", "wan"):
        assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (compressed / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["unet", "wan"])
def test_other_dtypes_are_those_of_the_plain_model(made: Directories, name: str, dtype: torch.dtype | None) -> None:
    plain, compressed = made(name)
    model = load(plain, dtype=dtype)
    for ours in (
        load(compressed, dtype=dtype),
        load(plain, dtype=dtype, quantization_config=BitforbitConfig()),
    ):
        assert ours.dtype == model.dtype
        assert zoo.compressed_modules(ours) > 0
        zoo.assert_same_parameters(ours, model)
        assert torch.equal(zoo.outputs(name, ours), zoo.outputs(name, model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_checkpoints_in_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = zoo.make("unet", dtype)
    model.save_pretrained(tmp_path / "plain")
    bitforbit.compress(tmp_path / "plain", tmp_path / "compressed", threads=1)
    ours = load(tmp_path / "compressed", dtype=dtype)
    assert {spec.dtype for m in ours.modules() for spec in compressed_parameters(m).values()} == {dtype}
    zoo.assert_same_parameters(ours, model)
    assert torch.equal(zoo.outputs("unet", ours), zoo.outputs("unet", model))


def test_every_kind_of_layer_is_compressed(made: Directories) -> None:
    for name, kinds in (("unet", {"Linear", "Conv2d"}), ("wan", {"Linear", "Conv3d"})):
        ours = load(made(name)[1])
        assert kinds <= {type(module).__name__ for module in ours.modules() if compressed_parameters(module)}


def test_shards_are_those_of_the_plain_model(made: Directories, tmp_path: Path) -> None:
    plain, compressed = made("flux")
    for directory, target in ((plain, "plain"), (compressed, "compressed")):
        load(directory).save_pretrained(tmp_path / target, max_shard_size="20KB")
    again = load(tmp_path / "compressed")
    zoo.assert_same_parameters(again, load(plain))
    bitforbit.decompress(tmp_path / "compressed", tmp_path / "back", threads=1)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) > 4
    _, different, missing = filecmp.cmpfiles(tmp_path / "plain", tmp_path / "back", names, shallow=False)
    assert (different, missing) == (["config.json"], [])  # which names the directory that it was loaded from
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("plain", "back")]
    assert [config.pop("_name_or_path") for config in configs] == [str(plain), str(compressed)]
    assert configs[0] == configs[1]
    load(plain).save_pretrained(tmp_path / "compressed")  # a plain model saves over it as it always does
    load(compressed).save_pretrained(tmp_path / "compressed")
    assert len(list((tmp_path / "compressed").glob("*.safetensors"))) == 1


def test_variants(made: Directories, tmp_path: Path) -> None:
    plain, _ = made("unet")
    model = load(plain, dtype=torch.float16)
    model.save_pretrained(tmp_path / "plain", variant="fp16")
    load(plain, dtype=torch.float32).save_pretrained(tmp_path / "plain")
    bitforbit.compress(tmp_path / "plain", tmp_path / "compressed", threads=1)
    ours = load(tmp_path / "compressed", variant="fp16", dtype=torch.float16)
    zoo.assert_same_parameters(ours, model)
    ours.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size="100KB")
    assert (tmp_path / "saved" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    zoo.assert_same_parameters(load(tmp_path / "saved", variant="fp16", dtype=torch.float16), model)


def test_old_names_of_attention_weights(tmp_path: Path) -> None:
    model = zoo.make("vae")
    model.save_pretrained(tmp_path / "plain")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(tmp_path / "plain" / WEIGHTS).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        tensors[name] = value
    assert any(".query.weight" in name for name in tensors)
    save_file(tensors, tmp_path / "plain" / WEIGHTS, {"format": "pt"})
    bitforbit.compress(tmp_path / "plain", tmp_path / "compressed", threads=1)
    for options in ({}, {"dtype": torch.float32}):
        ours, plain = load(tmp_path / "compressed", **options), load(tmp_path / "plain", **options)
        zoo.assert_same_parameters(ours, plain)
        assert torch.equal(zoo.outputs("vae", ours), zoo.outputs("vae", plain))


def test_modules_that_are_not_converted(made: Directories) -> None:
    plain, compressed = made("flux")
    for directory in (plain, compressed):
        ours = load(directory, quantization_config=BitforbitConfig(modules_to_not_convert=["transformer_blocks"]))
        assert zoo.compressed_modules(ours.transformer_blocks) == 0
        everything = load(directory, quantization_config=BitforbitConfig())
        assert zoo.compressed_modules(everything.transformer_blocks) > 0
        rest = zoo.compressed_modules(everything) - zoo.compressed_modules(everything.transformer_blocks)
        assert zoo.compressed_modules(ours) == rest
        zoo.assert_same_parameters(ours, load(plain))


def test_the_config_that_is_passed_wins(made: Directories, recwarn: pytest.WarningsRecorder) -> None:
    config = BitforbitConfig(mode="fused", verify=False, threads=1)
    ours = load(made("flux")[1], quantization_config=config)
    assert ours.hf_quantizer.quantization_config.mode == "fused"
    assert "mode='fused'" in repr(ours)
    assert '"mode": "fused"' in repr(ours.hf_quantizer.quantization_config)
    assert not [w for w in recwarn if "will be used" in str(w.message)]


def test_the_config_of_transformers_serves_as_well(made: Directories) -> None:
    ours = load(made("flux")[0], quantization_config=bitforbit.BitforbitConfig())
    assert zoo.compressed_modules(ours) == 18


def test_first_parameters_have_the_dtype_to_compute_in(made: Directories) -> None:
    for name in zoo.MODELS:
        plain, ours = (load(each) for each in made(name))
        assert next(ours.parameters()).dtype == next(plain.parameters()).dtype
        assert len(list(ours.parameters())) == len(list(ours.named_parameters()))
    wan = load(made("wan")[1])
    assert next(wan.condition_embedder.time_embedder.parameters()).dtype.is_floating_point


def test_single_files(made: Directories, tmp_path: Path) -> None:
    plain, _ = made("flux")
    (tmp_path / "transformer").mkdir()
    shutil.copy(plain / "config.json", tmp_path / "transformer")
    ours = FluxTransformer2DModel.from_single_file(
        str(plain / WEIGHTS), config=str(tmp_path), subfolder="transformer", dtype=torch.bfloat16,
        quantization_config=BitforbitConfig(),
    )  # fmt: skip
    assert zoo.compressed_modules(ours) == 18
    zoo.assert_same_parameters(ours, load(plain))


def test_compressing_after_loading(made: Directories, tmp_path: Path) -> None:
    plain, compressed = made("flux")
    model = load(plain)
    expected = zoo.outputs("flux", model)
    assert bitforbit.compress_model(model) is model
    assert torch.equal(zoo.outputs("flux", model), expected)
    model.save_pretrained(tmp_path / "compressed")
    assert (tmp_path / "compressed" / WEIGHTS).read_bytes() == (compressed / WEIGHTS).read_bytes()
    bitforbit.decompress_model(model)
    model.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    model.to(torch.float16)


def test_dequantize(made: Directories, tmp_path: Path) -> None:
    plain, compressed = made("flux")
    model = load(compressed)
    model.dequantize()
    assert zoo.compressed_modules(model) == 0
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert model.half().dtype == torch.float16


def test_copies_are_independent(made: Directories, tmp_path: Path) -> None:
    model = load(made("flux")[1])
    copied = copy.deepcopy(model)
    bitforbit.decompress_model(model)
    assert zoo.compressed_modules(copied) == 18
    copied.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (made("flux")[1] / WEIGHTS).read_bytes()
    state = copied.state_dict()
    assert "norm_out.linear.weight" in state
    assert "norm_out.linear.weight" not in list(state)
    assert state["norm_out.linear.weight"].shape == (64, 32)
    assert "norm_out.linear.weight" not in copy.deepcopy(state)
    with pytest.raises(KeyError):
        state["no.weight"]


def test_tiling_and_slicing(made: Directories) -> None:
    plain, compressed = (AutoencoderKL.from_pretrained(each, dtype=torch.bfloat16) for each in made("vae"))
    for model in (plain, compressed):
        model.enable_tiling()
        model.enable_slicing()
        model.tile_sample_min_size = 16
        model.tile_latent_min_size = 8
    latents = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        assert torch.equal(compressed.decode(latents).sample, plain.decode(latents).sample)
