"""device_map: everything on the CPU, or some of it left on disk by accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitforbit
from bitforbit import BitforbitConfig
from integrations import zoo
from integrations.conftest import Directories

pytest.importorskip("accelerate")


def maps(name: str) -> dict[str, Any]:
    """Which module is on disk."""
    if name == "gpt2":
        return {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "disk", "transformer.h.1": "cpu",
                "transformer.ln_f": "cpu", "lm_head": "cpu"}  # fmt: skip
    return {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
            "model.rotary_emb": "cpu", "lm_head": "disk" if name == "llama" else "cpu"}  # fmt: skip


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_on_the_cpu(device_map: Any, directories: Directories) -> None:
    plain, native = directories("llama")
    model = zoo.auto_class("llama").from_pretrained(native, device_map=device_map)
    expected = zoo.auto_class("llama").from_pretrained(plain)
    assert torch.equal(zoo.logits(model, "llama", 2), zoo.logits(expected, "llama", 2))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "gpt2"])
@pytest.mark.parametrize("compressed", [True, False])
def test_some_on_disk(name: str, compressed: bool, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    kwargs: dict[str, Any] = {"device_map": maps(name), "offload_folder": str(tmp_path / "offload")}
    if not compressed:
        kwargs["quantization_config"] = BitforbitConfig()
    model = auto.from_pretrained(native if compressed else plain, **kwargs)
    assert any(parameter.is_meta for parameter in model.parameters())
    expected = auto.from_pretrained(plain)
    assert torch.equal(zoo.logits(model, name, 2), zoo.logits(expected, name, 2))
    assert torch.equal(zoo.generated(model, name, 1), zoo.generated(expected, name, 1))
    assert any(parameter.is_meta for parameter in model.parameters())


def test_too_little_memory(directories: Directories, tmp_path: Path) -> None:
    """The map is made from the compressed sizes."""
    plain, native = directories("llama")
    auto = zoo.auto_class("llama")
    kwargs: dict[str, Any] = {
        "device_map": "auto",
        "max_memory": {"cpu": "350KB"},
        "offload_folder": str(tmp_path / "o"),
    }
    model = auto.from_pretrained(native, **kwargs)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    expected = auto.from_pretrained(plain)
    assert torch.equal(zoo.logits(model, "llama", 2), zoo.logits(expected, "llama", 2))


def test_native_tensors_stay_in_their_file(directories: Directories, tmp_path: Path) -> None:
    _, native = directories("llama")
    zoo.auto_class("llama").from_pretrained(native, device_map=maps("llama"), offload_folder=str(tmp_path / "offload"))
    assert list((tmp_path / "offload").iterdir()) == []


def test_damage_on_disk_is_seen(directories: Directories, tmp_path: Path) -> None:
    import shutil

    from integrations.test_refusals import flip

    native = Path(shutil.copytree(directories("llama")[1], tmp_path / "native"))
    flip(native / "model.safetensors", "model.layers.0.mlp.up_proj.digits__weight")
    with pytest.raises(bitforbit.errors.ChecksumError, match=r"layers\.0\.mlp\.up_proj"):
        zoo.auto_class("llama").from_pretrained(native, device_map=maps("llama"), offload_folder=str(tmp_path / "o"))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_offloaded_model_is_saved(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    model = zoo.auto_class(name).from_pretrained(
        native, device_map=maps(name), offload_folder=str(tmp_path / "offload")
    )
    model.save_pretrained(tmp_path / "saved")
    assert bitforbit.verify(tmp_path / "saved").ok
    bitforbit.decompress(tmp_path / "saved", tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
