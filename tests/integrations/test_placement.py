"""What is planned with before a model is loaded: bytes of parameters and room on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import bitforbit
from bitforbit import BitforbitConfig, errors
from bitforbit import nn as bnn
from bitforbit.integrations import runtime
from bitforbit.nn import layout
from bitforbit.ops import gpu
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from integrations.conftest import Directories

pytest.importorskip("accelerate")

HIDDEN, LAYERS, VOCABULARY = 256, 2, 512


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are large beside what tiles have around them."""
    directory = tmp_path_factory.mktemp("placed")
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory / "plain")
    bitforbit.compress(directory / "plain", directory / "native", threads=1)
    bitforbit.compress(directory / "plain", directory / "df11", format="df11", threads=1)
    return directory


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the loader knows when it makes the device map."""
    seen: dict[str, Any] = {}
    stock = tf.modeling_utils._get_device_map

    def look(model: Any, device_map: Any, max_memory: Any, quantizer: Any) -> Any:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        seen["bytes"] = sum(t.numel() * quantizer.param_element_size(model, name, t) for name, t in tensors)
        seen["memory"] = quantizer.adjust_max_memory({0: 10_000_000.5, 1: 300_000, "cpu": 10_000_000})
        return stock(model, device_map, max_memory, quantizer)

    monkeypatch.setattr(tf.modeling_utils, "_get_device_map", look)
    return seen


@pytest.fixture
def cpu_is_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")
    with gpu.emulate(EmulatedQueue(EmulatedLauncher(1))):
        yield
        gpu.clear()


@pytest.mark.usefixtures("cpu_is_gpu")
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("native", BitforbitConfig()),
        ("native", BitforbitConfig(runtime="planes")),
        ("plain", BitforbitConfig()),
        ("df11", BitforbitConfig(runtime="df11")),
    ],
)
def test_bytes_are_planned(kind: str, config: BitforbitConfig, plain: Path, planned: dict[str, Any]) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(plain / kind, quantization_config=config, device_map={"": "cpu"})
    size = bnn.compressed_size(model)
    assert size.nbytes <= planned["bytes"] < 1.05 * size.nbytes
    assert planned["bytes"] < 0.8 * (size.original_nbytes + size.plain_nbytes)
    # The largest two linears in a row: the head, and a projection of the layer before it.
    scratch = 2 * (VOCABULARY * HIDDEN + 2 * HIDDEN * HIDDEN)
    assert planned["memory"] == {0: 10_000_000 - scratch, 1: max(0, 300_000 - scratch), "cpu": 10_000_000}


def test_on_a_cpu_memory_is_left_alone(directories: Directories) -> None:
    quantizer = tf.quantizers.auto.AutoHfQuantizer.from_config(BitforbitConfig())
    assert quantizer.adjust_max_memory({"cpu": 5}) == {"cpu": 5}


def test_devices() -> None:
    places = runtime.devices({"a": "cpu", "b": "disk", "c": 1, "d": "cuda:1", "e": torch.device("cpu")})
    assert places == [
        torch.device("cpu"),
        "disk",
        torch.device("cuda", 1),
        torch.device("cuda", 1),
        torch.device("cpu"),
    ]
    assert runtime.devices("auto") == runtime.devices(None) == []


def test_df11_is_for_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "require_gpu", lambda device: None)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    for places in ([cuda, cpu], [cuda, "disk"]):
        runtime.check_devices(places, "tiles")
        with pytest.raises(errors.UsageError, match="all of the model on GPUs for runtime='df11'"):
            runtime.check_devices(places, "df11")
    runtime.check_devices([cuda], "df11")
    with pytest.raises(errors.UsageError, match="a GPU for runtime='df11', got cpu, disk"):
        runtime.check_devices([cpu, "disk"], "df11")


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitforbit.cuda import device

    monkeypatch.setattr(device, "require", lambda ordinal: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.GpuUnavailableError, match="built for CUDA"):
        runtime.require_gpu(torch.device("cuda"))
