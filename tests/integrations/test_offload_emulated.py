"""Layers in host memory beside a "GPU", which is the CPU: what a device map with ``"cpu"`` beside GPUs does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bitforbit
from bitforbit.nn import compressed_parameters, layout
from bitforbit.ops import gpu
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from integrations import zoo
from integrations.conftest import Directories

accelerate = pytest.importorskip("accelerate")

from bitforbit.integrations.transformers import offload  # noqa: E402


@pytest.fixture
def cpu_is_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")
    with gpu.emulate(EmulatedQueue(EmulatedLauncher(1))):
        yield
        gpu.clear()


def dispatched(name: str, native: Path) -> Any:
    """A model whose layers are in host memory: to accelerate, this device is another one than ``"cpu"``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "is_gpu", lambda device: False)
        model = zoo.auto_class(name).from_pretrained(native)
        main = torch.device("cpu")
        layers = "transformer.h" if name == "gpt2" else "model.layers"
        places: dict[str, Any] = {"": main, layers: "cpu"}
        accelerate.dispatch_model(model, places, main_device=main)
    offload.stream(model, 1)
    return model


@pytest.mark.usefixtures("cpu_is_gpu")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_layers_in_host_memory(name: str, directories: Directories, tmp_path: Path) -> None:
    """They run from tiles, and are saved as the planes that they were loaded from."""
    plain, native = directories(name)
    model = dispatched(name, native)
    (stream,) = offload.streams_of(model)
    assert [each.rsplit(".", 1)[1] for each in stream.names] == ["0", "1"]
    assert stream.host_bytes
    assert not stream.file_bytes
    block = model.get_submodule(stream.names[1])
    seen = set()

    def look(module: Any, args: Any, output: Any) -> None:
        found = (compressed_parameters(each) for each in module.modules())
        seen.update(spec.layout for specs in found for spec in specs.values())

    children = [each for each in block.children() if any(True for _ in each.children())]
    handles = [each.register_forward_hook(look) for each in children]
    expected = zoo.auto_class(name).from_pretrained(plain)
    for batch in (1, 2):
        assert torch.equal(zoo.logits(model, name, batch), zoo.logits(expected, name, batch))
    assert seen == {"tiles"}
    for handle in handles:
        handle.remove()
    assert {spec.layout for each in block.modules() for spec in compressed_parameters(each).values()} == {"planes"}
    model.save_pretrained(tmp_path / "saved")
    assert bitforbit.verify(tmp_path / "saved").ok
    bitforbit.decompress(tmp_path / "saved", tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("cpu_is_gpu")
def test_host_memory_is_held_once(directories: Directories) -> None:
    """What accelerate kept of the blocks is let go."""
    model = dispatched("llama", directories("llama")[1])
    maps = [each._hf_hook.weights_map for each in model.modules() if hasattr(each, "_hf_hook")]
    loaders = [found.dataset for found in maps if hasattr(found, "dataset")]
    assert not any(".layers." in name for loader in loaders for name in loader.state_dict)
