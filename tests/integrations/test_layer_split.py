"""Layers over several devices: maps made from compressed sizes, activations and caches on each layer's device.

Without GPUs maps are made for pretended ones, and the second device of a model that runs is torch's "meta", on which
shapes and devices are those of a real run and values are not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import bitforbit
from bitforbit import nn as bnn
from bitforbit.integrations import runtime
from bitforbit.nn import layout
from integrations import zoo
from integrations.conftest import Directories

accelerate = pytest.importorskip("accelerate")

HIDDEN, LAYERS, VOCABULARY = 128, 8, 256
MapFor = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight layers, plain and compressed."""
    directory = tmp_path_factory.mktemp("eight")
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory / "plain")
    bitforbit.compress(directory / "plain", directory / "native", threads=1)
    return directory


class PlannedError(Exception):
    """The map is made: nothing is to be loaded."""


@pytest.fixture
def map_for(eight: Path, monkeypatch: pytest.MonkeyPatch) -> MapFor:
    """The map that loading makes of limits for GPUs that are not there."""
    stock = tf.modeling_utils._get_device_map
    made: dict[str, Any] = {}

    def look(model: Any, device_map: Any, max_memory: Any, quantizer: Any) -> Any:
        made["map"] = stock(model, device_map, max_memory, quantizer)
        made["sizes"] = sizes(model, quantizer)
        raise PlannedError

    def pretended(max_memory: dict[Any, Any]) -> dict[Any, Any]:
        return dict(max_memory)

    monkeypatch.setattr(tf.modeling_utils, "_get_device_map", look)
    monkeypatch.setattr(tf.integrations.accelerate, "get_max_memory", pretended)
    monkeypatch.setattr(runtime, "require_gpu", lambda device: None)
    monkeypatch.setattr(layout, "is_gpu", lambda device: device.type in ("cpu", "cuda"))

    def get(kind: str, max_memory: dict[Any, int], device_map: str = "auto") -> dict[str, Any]:
        with pytest.raises(PlannedError):
            tf.AutoModelForCausalLM.from_pretrained(eight / kind, device_map=device_map, max_memory=max_memory)
        return dict(made)

    return get


def sizes(model: Any, quantizer: Any) -> dict[str, float]:
    """Bytes of every parameter as loading plans with them."""
    return {
        name: p.numel() * (p.element_size() if quantizer is None else quantizer.param_element_size(model, name, p))
        for name, p in model.named_parameters()
    }


def place_of(name: str, device_map: dict[str, Any]) -> Any:
    """The device of a parameter."""
    return next(place for key, place in device_map.items() if not key or name == key or name.startswith(f"{key}."))


def loads(made: dict[str, Any]) -> dict[Any, float]:
    """Bytes on each device."""
    found: dict[Any, float] = {}
    for name, nbytes in made["sizes"].items():
        place = place_of(name, made["map"])
        found[place] = found.get(place, 0) + nbytes
    return found


def layer_places(device_map: dict[str, Any]) -> list[Any]:
    return [place_of(f"model.layers.{i}.mlp", device_map) for i in range(LAYERS)]


def test_compressed_sizes_are_balanced(map_for: MapFor) -> None:
    made = map_for("native", {0: 10**8, 1: 10**8, "cpu": 10**9})
    found = loads(made)
    assert set(found) == {0, 1}
    layer = sum(nbytes for name, nbytes in made["sizes"].items() if name.startswith("model.layers.0."))
    assert abs(found[0] - found[1]) <= 3 * layer  # accelerate leaves room for 1.25 of the largest block on the first
    assert layer_places(made["map"]) == sorted(layer_places(made["map"]))
    plain = map_for("plain", {0: 10**8, 1: 10**8, "cpu": 10**9})
    assert sum(found.values()) < 0.85 * sum(loads(plain).values())


def test_two_gpus_hold_compressed_what_they_do_not_hold_plain(map_for: MapFor) -> None:
    """Limits between the sizes of both kinds: the plain model is offloaded, the compressed one is not."""
    scratch = 2 * (VOCABULARY * HIDDEN + 2 * HIDDEN * HIDDEN)
    whole = sum(map_for("native", {0: 10**8, 1: 10**8, "cpu": 10**9})["sizes"].values())
    limit = int(0.62 * whole) + scratch
    compressed = map_for("native", {0: limit, 1: limit, "cpu": 10**9}, "sequential")
    assert set(compressed["map"].values()) == {0, 1}
    assert all(nbytes + scratch <= limit for nbytes in loads(compressed).values())
    plain = map_for("plain", {0: limit - scratch, 1: limit - scratch, "cpu": 10**9}, "sequential")
    assert set(plain["map"].values()) == {0, 1, "cpu"}


def test_a_smaller_gpu_gets_fewer_layers(map_for: MapFor) -> None:
    whole = sum(map_for("native", {0: 10**8, 1: 10**8, "cpu": 10**9})["sizes"].values())
    for small in (0, 1):
        limits = {gpu: int(0.55 * whole) if gpu == small else 10**8 for gpu in (0, 1)}
        made = map_for("native", {**limits, "cpu": 10**9}, "sequential")
        found = layer_places(made["map"])
        assert found == sorted(found)
        assert loads(made).get(small, 0) <= 0.55 * whole
        assert set(found) == ({0, 1} if small == 0 else {0})


def test_what_two_gpus_do_not_hold_is_offloaded(map_for: MapFor) -> None:
    whole = sum(map_for("native", {0: 10**8, 1: 10**8, "cpu": 10**9})["sizes"].values())
    scratch = 2 * (VOCABULARY * HIDDEN + 2 * HIDDEN * HIDDEN)
    limit = int(0.4 * whole) + scratch
    made = map_for("native", {0: limit, 1: limit, "cpu": 10**9}, "sequential")
    assert set(made["map"].values()) == {0, 1, "cpu"}
    order = [0, 1, "cpu"]
    found = [order.index(place) for place in layer_places(made["map"])]
    assert found == sorted(found)
    assert all(loads(made)[place] + scratch <= limit for place in (0, 1))


def test_on_a_cpu_what_fits_is_not_streamed(directories: Directories, tmp_path: Path) -> None:
    """A tied head counts once, and weights as the planes that they are."""
    from bitforbit.format.header import read_header
    from bitforbit.integrations.transformers.offload import streams_of

    native = directories("llama-tied")[1]
    tensors = [each for file in native.glob("*.safetensors") for each in read_header(file).tensors]
    layer = sum(each.nbytes for each in tensors if each.name.startswith("model.layers.0."))
    whole = sum(each.nbytes for each in tensors)
    for limit, streamed in ((1.01 * (whole + layer), 0), (0.9 * whole, 1)):
        model = zoo.auto_class("llama-tied").from_pretrained(
            native, device_map="auto", max_memory={"cpu": int(limit)}, offload_folder=str(tmp_path)
        )
        assert len(streams_of(model)) == streamed
        assert bool(streamed) == any(parameter.is_meta for parameter in model.parameters())


def two_devices(model: Any, first: int) -> dict[str, Any]:
    """The first layers on the CPU, the others on "meta"."""
    layers = {f"model.layers.{i}": "cpu" if i < first else "meta" for i in range(len(model.model.layers))}
    ends = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "meta", "lm_head": "meta"}
    return {**layers, **ends}


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_activations_and_caches_are_where_the_layers_are(name: str, mode: str, directories: Directories) -> None:
    model = zoo.auto_class(name).from_pretrained(directories(name)[1])
    bnn.set_mode(model, mode)
    accelerate.dispatch_model(model, two_devices(model, 1), main_device="cpu")
    seen: dict[int, list[str]] = {0: [], 1: []}

    def note(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen[index].append(hidden.device.type)

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(note(index))
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in (5, 1):
            out = model.model(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
            assert out.last_hidden_state.device.type == "meta"
            assert out.last_hidden_state.shape == (1, tokens, model.config.hidden_size)
    assert seen == {0: ["cpu"] * 2, 1: ["meta"] * 2}
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta"]
    assert [layer.values.shape[-2] for layer in cache.layers] == [6, 6]
    places = {part.device.type for part in model.model.layers[1].parameters()}
    assert places == {"meta"}


def hooked(directory: Path) -> Any:
    """A model with all of accelerate's hooks, though all of it is on one device."""
    model = zoo.auto_class("llama").from_pretrained(directory)
    everything = dict.fromkeys(two_devices(model, 1), "cpu")
    accelerate.dispatch_model(model, everything, force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for layer in model.model.layers)
    return model


def test_hooks_change_no_bit(directories: Directories) -> None:
    plain, native = directories("llama")
    model, expected = hooked(native), zoo.auto_class("llama").from_pretrained(plain)
    assert torch.equal(zoo.logits(model, "llama", 3), zoo.logits(expected, "llama", 3))
    assert torch.equal(zoo.generated(model, "llama", 2), zoo.generated(expected, "llama", 2))


def test_quantized_caches_under_hooks(directories: Directories) -> None:
    native = directories("llama")[1]
    ids = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for model in (hooked(native), zoo.auto_class("llama").from_pretrained(native)):
        cache = bitforbit.kivi_cache(model, k_bits=4, v_bits=4, group=32, residual=32)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, past_key_values=cache
        )
        found.append(out)
    assert torch.equal(*found)
