"""device_map: everything on the CPU, or some of it left on disk by accelerate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import bitforbit
from bitforbit import BitforbitConfig, errors
from integrations import zoo
from integrations.conftest import Directories

pytest.importorskip("accelerate")

from bitforbit.integrations.transformers import offload
from bitforbit.integrations.transformers.offload import streams_of


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


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_too_little_memory(name: str, directories: Directories, tmp_path: Path) -> None:
    """The map is made from the compressed sizes."""
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    kwargs: dict[str, Any] = {
        "device_map": "auto",
        "max_memory": {"cpu": "350KB"},
        "offload_folder": str(tmp_path / "o"),
    }
    model = auto.from_pretrained(native, **kwargs)
    (stream,) = streams_of(model)
    assert set(stream.names) <= {*blocks("llama")}
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    expected = auto.from_pretrained(plain)
    assert torch.equal(zoo.logits(model, name, 2), zoo.logits(expected, name, 2))


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


# --- what is streamed -----------------------------------------------------------------------------------------------


def offloaded(name: str, native: Path, **config: Any) -> Any:
    """With all layers, and the head if it is not tied, on disk."""
    places = maps(name)
    for each in places:
        if ".layers." in each or ".h." in each:
            places[each] = "disk"
    options = BitforbitConfig(**config)
    return zoo.auto_class(name).from_pretrained(native, device_map=places, quantization_config=options)


def blocks(name: str) -> list[str]:
    if name == "gpt2":
        return ["transformer.h.0", "transformer.h.1"]
    return ["model.layers.0", "model.layers.1", *(["lm_head"] if name == "llama" else [])]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layers_and_head_are_streamed(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    zoo.write(name, tmp_path / "plain", dtype)
    bitforbit.compress(tmp_path / "plain", tmp_path / "native", threads=1)
    expected = zoo.auto_class(name).from_pretrained(tmp_path / "plain")
    model = offloaded(name, tmp_path / "native", ahead=1)
    (stream,) = streams_of(model)
    assert stream.names == blocks(name)
    assert stream.host_bytes == 0
    for batch in (1, 2):
        assert torch.equal(zoo.logits(model, name, batch), zoo.logits(expected, name, batch))
    assert torch.equal(zoo.generated(model, name, 1), zoo.generated(expected, name, 1))
    assert stream.fetched[1] == 1


def test_off(directories: Directories) -> None:
    """accelerate's way."""
    plain, native = directories("llama")
    model = offloaded("llama", native, ahead=None)
    assert streams_of(model) == []
    expected = zoo.auto_class("llama").from_pretrained(plain)
    assert torch.equal(zoo.logits(model, "llama", 2), zoo.logits(expected, "llama", 2))
    with pytest.raises(errors.UsageError, match="ahead to be a number of blocks"):
        BitforbitConfig(ahead=-1)


def test_the_map_says_where_blocks_compute(directories: Directories) -> None:
    model = offloaded("llama", directories("llama")[1])
    assert set(model.hf_device_map.values()) == {"cpu"}


def test_state_dicts_are_as_with_accelerate(directories: Directories) -> None:
    native = directories("llama")[1]
    ours, theirs = (offloaded("llama", native, ahead=ahead).state_dict() for ahead in (2, None))
    assert list(ours) == list(theirs)
    assert all((ours[name].shape, ours[name].device) == (value.shape, value.device) for name, value in theirs.items())


def test_weights_can_be_read(directories: Directories) -> None:
    plain, native = directories("llama")
    model, expected = offloaded("llama", native), zoo.auto_class("llama").from_pretrained(plain)
    for ours, theirs in ((model.lm_head, expected.lm_head), (model.model.layers[1].mlp, expected.model.layers[1].mlp)):
        ours, theirs = getattr(ours, "up_proj", ours), getattr(theirs, "up_proj", theirs)
        assert ours.weight.device == torch.device("cpu")
        assert torch.equal(ours.weight.clone(), theirs.weight)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_dequantize(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    places = maps(name)
    model = zoo.auto_class(name).from_pretrained(native, device_map=places, offload_folder=str(tmp_path / "offload"))
    expected = zoo.auto_class(name).from_pretrained(plain)
    model = model.dequantize()
    assert streams_of(model) == []
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(zoo.logits(model, name, 2), zoo.logits(expected, name, 2))


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_lora(checkpointing: bool | str, directories: Directories) -> None:
    """Gradients of adapters, through blocks whose memory was used by others meanwhile."""
    peft = pytest.importorskip("peft")
    plain, native = directories("llama")
    found = []
    for model in (offloaded("llama", native, ahead=0), zoo.auto_class("llama").from_pretrained(plain)):
        torch.manual_seed(0)
        options = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, options).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        ids = zoo.inputs("llama", 2)
        model(**ids, labels=ids["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 8
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_adapters_are_loaded(directories: Directories, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain, native = directories("llama")
    options = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    auto = zoo.auto_class("llama")
    peft.get_peft_model(auto.from_pretrained(plain), options).save_pretrained(tmp_path)
    models = [offloaded("llama", native), auto.from_pretrained(plain)]
    for model in models:
        model.load_adapter(str(tmp_path))
    ours, theirs = (zoo.logits(model, "llama", 2) for model in models)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, zoo.logits(auto.from_pretrained(plain), "llama", 2))


def test_a_disk_that_fails(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloaded("llama", directories("llama")[1])

    def fail(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        errors.BlockReadError, match=r"block 'model\.layers\.0'.*Input/output error.*model\.safetensors"
    ):
        zoo.logits(model, "llama", 1)


@pytest.mark.parametrize("classes", [None, [], ["LlamaDecoderLayer"], {"LlamaDecoderLayer"}])
def test_what_layers_are(classes: Any, directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.auto_class("llama").from_pretrained(directories("llama")[0])
    monkeypatch.setattr(model, "_no_split_modules", classes)
    assert [name for name, _ in offload._blocks(model, lambda _: True)] == blocks("llama")


# --- memory ---------------------------------------------------------------------------------------------------------


def test_room_for_slots(directories: Directories) -> None:
    plain = zoo.auto_class("llama").from_pretrained(directories("llama")[0])
    sizes = {name: float(p.numel() * 2) for name, p in [*plain.named_parameters(), *plain.named_buffers()]}
    total = sum(sizes.values())
    layer = sum(value for name, value in sizes.items() if name.startswith("model.layers.0."))
    head = sizes["lm_head.weight"]
    room = {0: 10 * total, "cpu": 5}
    assert offload.leave_room(plain, room, sizes, 2) == (room, 2)  # all of it fits
    limits, ahead = offload.leave_room(plain, {0: total, "cpu": 10 * total}, sizes, 1)
    # One layer's room is left by transformers.
    assert (limits, ahead) == ({0: int(total - layer), "cpu": 10 * total}, 1) or ahead == 0
    for limit, expected in ((2 * (2 * layer + head), 2), (4 * layer, 1), (4 * layer - 2, 0), (1, 0)):
        big = {name: value if "layers" in name or "lm_head" in name else 1e9 for name, value in sizes.items()}
        limits, ahead = offload.leave_room(plain, {"cpu": limit}, big, 2)
        slots = {2: 2 * layer + head, 1: 2 * layer, 0: layer}[ahead]
        assert (limits["cpu"], ahead) == (max(0, int(limit - (slots - layer))), expected)
    assert offload.leave_room(plain, {0: 0, 1: 6 * layer, "cpu": 7}, big, 2)[0] == {
        0: 0, 1: int(6 * layer - 2 * layer - head), "cpu": 7
    }  # fmt: skip


_PEAK = """
import gc, sys, torch, transformers
import bitforbit
from bitforbit.integrations import autoload
autoload.autoload()
from bitforbit.integrations.transformers.offload import streams_of

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

torch.set_num_threads(1)
directory = sys.argv[1]
places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
          "model.layers": "disk"}
model = transformers.AutoModelForCausalLM.from_pretrained(directory, device_map=places)
(stream,) = streams_of(model)
ids = torch.arange(8)[None]
with torch.no_grad():
    other = bitforbit.compress_model(torch.nn.Linear(512, 512, dtype=torch.bfloat16))
    other(torch.zeros(1, 8, 512, dtype=torch.bfloat16))  # libraries allocate, once
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for _ in range(2):
        model(ids)
print(stream.file_bytes, stream.slot_bytes, status("VmHWM") - before)
"""


def test_memory_stays_below_the_slots(tmp_path: Path) -> None:
    """Beside what is resident, a pass over a model that is on disk takes the slots, and a layer's activations."""
    import subprocess
    import sys

    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8
    )
    tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    bitforbit.compress(tmp_path / "plain", tmp_path / "native", threads=1)
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "native")], capture_output=True, text=True, check=True
    )
    in_files, slots, peak = map(int, run.stdout.split()[-3:])
    assert slots < in_files / 3.5
    assert peak < slots + (20 << 20) < in_files
