"""Pipelines: a directory of components, compressed, restored and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from transformers import CLIPTextModel, SiglipVisionConfig, SiglipVisionModel

import bitforbit
from bitforbit.archive.merge import merge
from bitforbit.archive.staging import Staging
from bitforbit.cli import main
from bitforbit.errors import AlreadyCompressedError, NotCompressedError, ResumeError
from bitforbit.integrations.diffusers.config import BitforbitConfig
from integrations.diffusers import zoo
from integrations.diffusers.conftest import Directories


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def load(directory: Path, **options: Any) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(directory, **options)


@pytest.mark.parametrize(("name", "dtype"), [("sd", None), ("sd", torch.float16), ("fluxes", torch.bfloat16)])
def test_images_are_equal(made: Directories, name: str, dtype: torch.dtype | None) -> None:
    plain, compressed = made(name)
    ours = load(compressed, dtype=dtype)
    models = {key: each for key, each in ours.components.items() if isinstance(each, torch.nn.Module)}
    assert len(models) == {"sd": 3, "fluxes": 4}[name]
    assert all(zoo.compressed_modules(models[key]) > 2 for key in models if not key.startswith("text"))
    assert np.array_equal(zoo.image(ours), zoo.image(load(plain, dtype=dtype)))


@pytest.mark.parametrize("name", ["sd", "fluxes"])
def test_files_come_back(made: Directories, tmp_path: Path, name: str) -> None:
    plain, compressed = made(name)
    assert bitforbit.verify(compressed, against=plain).ok
    bitforbit.decompress(compressed, tmp_path / "back", threads=1)
    assert files(tmp_path / "back") == files(plain)
    stored = files(compressed)
    for path, data in files(plain).items():
        if not path.endswith(".safetensors") and path.rpartition("/")[2] != "config.json":
            assert stored[path] == data
    sizes = [sum(map(len, each.values())) for each in (stored, files(plain))]
    assert sizes[0] < 0.9 * sizes[1]


def test_command_line(made: Directories, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, compressed = made("sd")
    target = str(tmp_path / "dst")
    assert main(["compress", str(plain), target]) == 0
    assert files(tmp_path / "dst") == files(compressed)
    assert main(["verify", target, "--against", str(plain)]) == 0
    assert main(["inspect", target]) == 0
    assert "bits/weight" in capsys.readouterr().out


def interrupt(patch: pytest.MonkeyPatch, source: Path, target: Path) -> None:
    """Compress, and stop when three files are finished."""
    stock = Staging.record

    def record(self: Staging, *entry: Any) -> None:
        stock(self, *entry)
        if len(self.finished) >= 3:
            raise KeyboardInterrupt

    with patch.context() as context:
        context.setattr(Staging, "record", record)
        with pytest.raises(KeyboardInterrupt):
            bitforbit.compress(source, target, threads=1)
    assert not target.exists()


def test_an_interrupted_run_is_continued(made: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compressed = made("fluxes")
    source, target = shutil.copytree(plain, tmp_path / "src"), tmp_path / "dst"
    interrupt(monkeypatch, source, target)
    assert bitforbit.compress(source, target, threads=1, resume=True).resumed_files >= 3
    assert files(target) == files(compressed)
    shutil.rmtree(target)
    interrupt(monkeypatch, source, target)
    os.utime(source / "vae" / "config.json", ns=(1, 1))
    with pytest.raises(ResumeError, match=r"vae/config\.json"):
        bitforbit.compress(source, target, threads=1, resume=True)


def test_parts_make_the_same_files(made: Directories, tmp_path: Path) -> None:
    plain, compressed = made("fluxes")
    for i in (1, 2):
        bitforbit.compress(plain, tmp_path / "dst", part=(i, 2), threads=1)
    merge(plain, tmp_path / "dst")
    assert files(tmp_path / "dst") == files(compressed)


def test_variants(made: Directories, tmp_path: Path) -> None:
    half = load(made("sd")[0], dtype=torch.float16)
    half.save_pretrained(tmp_path / "plain", variant="fp16")
    bitforbit.compress(tmp_path / "plain", tmp_path / "compressed", threads=1)
    ours = load(tmp_path / "compressed", variant="fp16", dtype=torch.float16)
    assert zoo.compressed_modules(ours.unet) > 0
    assert np.array_equal(zoo.image(ours), zoo.image(half))


def test_saving_a_pipeline(made: Directories, tmp_path: Path) -> None:
    plain, compressed = made("sd")
    load(compressed).save_pretrained(tmp_path / "saved")
    ours = load(tmp_path / "saved")
    assert zoo.compressed_modules(ours.unet) > 0
    assert zoo.compressed_modules(ours.text_encoder) > 0
    assert np.array_equal(zoo.image(ours), zoo.image(load(plain)))
    for use in (bitforbit.verify, lambda path: bitforbit.decompress(path, tmp_path / "no")):
        with pytest.raises(NotCompressedError, match="one by one; name one of them: text_encoder, unet, vae"):
            use(tmp_path / "saved")
    assert bitforbit.verify(tmp_path / "saved" / "unet").ok
    with pytest.raises(AlreadyCompressedError):
        bitforbit.compress(tmp_path / "saved", tmp_path / "twice")


@pytest.mark.parametrize("granular", [False, True])
def test_compressing_components_while_loading(made: Directories, granular: bool) -> None:
    plain, _ = made("sd")
    if granular:
        mapping = {"unet": BitforbitConfig(), "text_encoder": bitforbit.BitforbitConfig()}
        config = PipelineQuantizationConfig(quant_mapping=mapping)
    else:
        config = PipelineQuantizationConfig(
            quant_backend="bitforbit", quant_kwargs={"mode": "exact"}, components_to_quantize=["unet", "text_encoder"]
        )
    ours = load(plain, quantization_config=config)
    counts = [zoo.compressed_modules(model) for model in (ours.unet, ours.text_encoder, ours.vae)]
    assert min(counts[:2]) > 0
    assert counts[2] == 0
    assert np.array_equal(zoo.image(ours), zoo.image(load(plain)))


def test_components_that_are_quantized_already_are_copied(made: Directories, tmp_path: Path) -> None:
    source = shutil.copytree(made("sd")[0], tmp_path / "src")
    path = source / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "other"}}))
    bitforbit.compress(source, tmp_path / "dst", threads=1)
    expected, stored = files(source), files(tmp_path / "dst")
    same = {name for name, data in expected.items() if stored[name] == data}
    assert {"text_encoder/config.json", "text_encoder/model.safetensors"} <= same
    assert "unet/config.json" not in same
    bitforbit.decompress(tmp_path / "dst", tmp_path / "back", threads=1)
    assert files(tmp_path / "back") == expected


def test_components_with_pickles_are_copied(made: Directories, tmp_path: Path) -> None:
    source = shutil.copytree(made("sd")[0], tmp_path / "src")
    shutil.move(source / "vae" / "diffusion_pytorch_model.safetensors", source / "vae" / "diffusion_pytorch_model.bin")
    bitforbit.compress(source, tmp_path / "dst", threads=1)
    for name in ("config.json", "diffusion_pytorch_model.bin"):
        assert (tmp_path / "dst" / "vae" / name).read_bytes() == (source / "vae" / name).read_bytes()


def test_image_encoders_say_their_dtype(tmp_path: Path) -> None:
    """Pipelines ask the first parameter of an image encoder for the dtype of its input."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    zoo.randomize(SiglipVisionModel(config)).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    bitforbit.compress(tmp_path / "plain", tmp_path / "compressed", threads=1)
    ours = SiglipVisionModel.from_pretrained(tmp_path / "compressed")
    assert next(ours.parameters()).dtype == torch.bfloat16
    assert {id(each) for each in ours.parameters()} == {id(each) for _, each in ours.named_parameters()}
    bitforbit.decompress_model(ours)
    assert "parameters" not in vars(ours)


def test_text_encoders_load_by_themselves(made: Directories) -> None:
    encoder = CLIPTextModel.from_pretrained(made("sd")[1] / "text_encoder")
    assert zoo.compressed_modules(encoder) > 0


def test_diffusers_needs_no_import_of_ours(made: Directories) -> None:
    code = f"""
        import sys
        from bitforbit.integrations.autoload import autoload
        autoload()
        from diffusers import UNet2DConditionModel
        model = UNet2DConditionModel.from_pretrained({str(made("sd")[1] / "unet")!r})
        print(type(model.hf_quantizer).__module__)
    """
    source = str(Path(bitforbit.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{source}", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "bitforbit.integrations.diffusers.quantizer", result.stderr[-2000:]
