"""Where compressed models of diffusers are: offloaded, moved, compiled; as far as a CPU shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoModel, DiffusionPipeline

from bitforbit.errors import CompressedParameterError, GpuUnavailableError, UsageError
from bitforbit.integrations.diffusers.config import BitforbitConfig
from integrations.diffusers import zoo
from integrations.diffusers.conftest import Directories

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(directory: Path, **options: object) -> torch.nn.Module:
    return AutoModel.from_pretrained(str(directory), **{"dtype": torch.bfloat16, **options})


def test_model_offload(made: Directories) -> None:
    plain, compressed = made("fluxes")
    ours = DiffusionPipeline.from_pretrained(compressed, dtype=torch.bfloat16)
    ours.enable_model_cpu_offload(device="cpu")
    expected = zoo.image(DiffusionPipeline.from_pretrained(plain, dtype=torch.bfloat16))
    assert np.array_equal(zoo.image(ours), expected)


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_sequential_offload(made: Directories, tmp_path: Path, name: str) -> None:
    """What ``enable_sequential_cpu_offload`` does to each component."""
    ours = load(made(name)[1])
    expected = zoo.outputs(name, ours)
    cpu_offload(ours, torch.device("cpu"), offload_buffers=True)
    assert all(parameter.is_meta for parameter in ours.parameters())
    assert torch.equal(zoo.outputs(name, ours), expected)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (made(name)[1] / WEIGHTS).read_bytes()


def test_group_offload(made: Directories) -> None:
    ours = load(made("flux")[1])
    expected = zoo.outputs("flux", ours)
    cpu = torch.device("cpu")
    ours.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(zoo.outputs("flux", ours), expected)


@pytest.mark.parametrize("compressed", [False, True])
def test_offload_to_disk(made: Directories, tmp_path: Path, compressed: bool) -> None:
    directory = made("flux")[compressed]
    plain = load(directory)
    device_map = {name: "disk" if "blocks" in name else "cpu" for name, _ in plain.named_children()}
    ours = load(
        directory, device_map=device_map, offload_folder=str(tmp_path / "off"), quantization_config=BitforbitConfig()
    )
    assert any(parameter.is_meta for parameter in ours.parameters())
    assert torch.equal(zoo.outputs("flux", ours), zoo.outputs("flux", plain))
    ours.save_pretrained(tmp_path / "saved")
    zoo.assert_same_parameters(load(tmp_path / "saved"), load(made("flux")[0]))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_device_maps(made: Directories, device_map: object) -> None:
    plain, compressed = made("flux")
    assert torch.equal(zoo.outputs("flux", load(compressed, device_map=device_map)), zoo.outputs("flux", load(plain)))


def test_other_devices_are_refused(made: Directories) -> None:
    with pytest.raises(UsageError, match="expected a device_map of 'cpu'"):
        load(made("flux")[1], device_map={"": "xpu"})
    with pytest.raises(UsageError, match="expected a GPU for runtime='tiles'"):
        load(made("flux")[1], quantization_config=BitforbitConfig(runtime="tiles"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(made: Directories) -> None:
    with pytest.raises(GpuUnavailableError):
        load(made("flux")[1], device_map={"": "cuda"})


def test_casts(made: Directories) -> None:
    ours = load(made("flux")[1])
    assert ours.to("cpu", torch.bfloat16) is ours
    assert ours.to(dtype=None) is ours
    assert ours.to(torch.device("cpu")) is ours
    for arguments, options in (((torch.float16,), {}), (("cpu",), {"dtype": torch.float16})):
        with pytest.raises(UsageError, match=r"to stay torch\.bfloat16.* pass dtype=torch\.float16"):
            ours.to(*arguments, **options)
    with pytest.raises(CompressedParameterError, match=r"cast to torch\.float8"):
        ours.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    pipeline = DiffusionPipeline.from_pretrained(made("fluxes")[1], dtype=torch.bfloat16)
    pipeline.to("cpu", torch.bfloat16)
    with pytest.raises((UsageError, CompressedParameterError), match=r"to stay torch\.bfloat16"):
        pipeline.to(torch.float16)


def test_compiled(made: Directories) -> None:
    ours = load(made("flux")[1])
    assert torch.equal(zoo.outputs("flux", torch.compile(ours, backend="eager")), zoo.outputs("flux", ours))


def test_fused_projections(made: Directories) -> None:
    plain, ours = (load(each) for each in made("flux"))
    plain.fuse_qkv_projections()
    ours.fuse_qkv_projections()
    assert torch.equal(zoo.outputs("flux", ours), zoo.outputs("flux", plain))
