"""Layouts for GPUs, on CPU tensors through the emulation: everything but the move to another device is real."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bitforbit
from bitforbit import nn as bnn
from bitforbit.errors import UsageError
from bitforbit.nn import layout
from bitforbit.ops import gpu
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from torch_helpers import assert_same_bits, gaussian, random_bits

IDS = torch.tensor([[0, 17, 299], [5, 5, 18]])


@pytest.fixture
def emulated() -> Iterator[None]:
    with gpu.emulate(EmulatedQueue(EmulatedLauncher(3))):
        yield
        gpu.clear()


@pytest.fixture
def cpu_is_gpu(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What moves to the CPU is treated as if it came to a GPU."""
    monkeypatch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")


def small_model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(300, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False), nn.LayerNorm(64)
    ).to(dtype)


def pair(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    plain = small_model(dtype).requires_grad_(False)
    return bitforbit.compress_model(copy.deepcopy(plain)), plain


def layouts(model: nn.Module) -> list[str]:
    return [spec.layout for m in model.modules() for spec in bnn.compressed_parameters(m).values()]


def planes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert_same_bits(got[name], value)


@pytest.mark.usefixtures("emulated")
def test_tiles_compute_the_same_bits():
    model, plain = pair()
    assert bnn.set_layout(model, "tiles") is model
    assert layouts(model) == ["tiles"] * 3
    assert_same_bits(model(IDS), plain(IDS))
    for i in (0, 1, 3):
        assert_same_bits(model[i].weight.data, plain[i].weight)
    for shape in ((1, 64), (8, 64), (2, 3, 64), (64,), (0, 64)):
        x = gaussian(shape)
        assert_same_bits(model[1](x), plain[1](x))
    assert "bits/weight as tiles" in repr(model[1])
    size = bnn.compressed_size(model)
    assert size.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert size.original_nbytes + size.plain_nbytes == sum(2 * p.numel() for p in plain.parameters())
    bitforbit.decompress_model(model)
    assert layouts(model) == []
    assert_same_bits(model(IDS), plain(IDS))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model[1].__dict__.keys() == plain[1].__dict__.keys()


@pytest.mark.usefixtures("emulated")
def test_names_of_parts():
    model, _ = pair()
    before = [name for name, _ in model.named_parameters()]
    bnn.set_layout(model, "tiles")
    names = [name for name, _ in model.named_parameters()]
    assert names[4:9] == [f"1.{part}__weight" for part in bnn.TilesSpec.part_names] + ["1.bias"]
    assert all(not p.requires_grad for _, p in model.named_parameters())
    bnn.set_layout(model, "planes")
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.usefixtures("emulated")
def test_back_to_planes_gives_the_same_bytes():
    model, _ = pair()
    expected = planes_of(model)
    parameters = [weakref.ref(p) for p in model[1].parameters() if p.dtype == torch.uint8]
    bnn.set_layout(model, "tiles")
    gc.collect()
    assert not any(p() is not None for p in parameters)  # planes do not stay in memory
    assert_same_state(model.state_dict(), expected)
    assert layouts(model) == ["tiles"] * 3
    bnn.set_layout(model, "planes")
    assert_same_state(dict(model.named_parameters()), expected)


@pytest.mark.usefixtures("emulated")
def test_what_stays_planes():
    model, plain = pair(torch.float32)
    bnn.set_layout(model, "tiles")
    assert layouts(model) == ["planes"] * 3
    assert_same_bits(model(IDS), plain(IDS))
    linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    bnn.compress_parameter(linear, "weight")
    values = random_bits((64, 64), torch.bfloat16)
    linear.load_state_dict({"weight": values})
    bnn.set_layout(linear, "tiles")
    assert layouts(linear) == ["planes"]
    assert_same_bits(linear.weight.data, values)


def test_tiles_are_for_gpus():
    model, plain = pair()
    with pytest.raises(UsageError, match="on a CUDA device"):
        bnn.set_layout(model, "tiles")
    with pytest.raises(UsageError, match="a layout among auto, planes, tiles, got 'df11'"):
        bnn.set_layout(model, "df11")
    assert layouts(bnn.set_layout(model, "auto")) == ["planes"] * 3
    assert_same_bits(model(IDS), plain(IDS))


# --- moves ------------------------------------------------------------------------------------------------------


def test_moves(emulated: None, monkeypatch: pytest.MonkeyPatch):
    model, plain = pair()
    expected = planes_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")
        model.to("cpu")
        assert layouts(model) == ["tiles"] * 3
        assert_same_bits(model(IDS), plain(IDS))
        model.bfloat16()
        assert layouts(bnn.set_layout(model, "planes")) == ["planes"] * 3
        model.to("cpu")  # what was chosen stays
        assert layouts(model) == ["planes"] * 3
        assert layouts(bnn.set_layout(model, "auto")) == ["tiles"] * 3
    bnn.set_layout(model, "auto")  # not on a GPU any more
    assert layouts(model) == ["planes"] * 3
    assert_same_state(model.state_dict(), expected)


def test_leaving_a_gpu_converts_first(emulated: None, monkeypatch: pytest.MonkeyPatch):
    """With devices that differ in name only: the parts are planes by the time they move."""
    model, _ = pair()
    bnn.set_layout(model, "tiles")
    linear, seen = model[1], []

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.uint8:
            seen.append(tensor.numel())
        return tensor

    monkeypatch.setattr(layout, "leaves_gpu", lambda before, after: True)
    linear._apply(move)
    assert linear._bitforbit_specs["weight"].layout == "planes"
    assert seen == [p.numel() for p in linear._bitforbit_parts("weight")]


def test_what_leaves_a_gpu() -> None:
    cpu, meta, first, second = map(torch.device, ("cpu", "meta", "cuda:0", "cuda:1"))
    assert layout.leaves_gpu(first, cpu)
    for move in ((first, second), (first, first), (first, meta), (meta, cpu), (cpu, first), (cpu, cpu)):
        assert not layout.leaves_gpu(*move)


@pytest.mark.usefixtures("emulated")
def test_meta_has_nothing_to_convert():
    model, _ = pair()
    bnn.set_layout(model, "tiles").to("meta")
    assert layouts(model) == ["tiles"] * 3
    assert model(IDS.to("meta")).shape == (2, 3, 64)
    assert all(value.is_meta for value in model.state_dict().values())
    bnn.set_layout(model, "auto")
    assert layouts(model) == ["tiles"] * 3


@pytest.mark.usefixtures("cpu_is_gpu")
def test_compress_model_on_a_gpu():
    plain = small_model()
    model = bitforbit.compress_model(copy.deepcopy(plain))
    assert layouts(model) == ["tiles"] * 3
    assert_same_bits(model(IDS), plain(IDS).detach())
    expected = bitforbit.compress_model(copy.deepcopy(plain).half())
    assert layouts(expected) == ["tiles"] * 3
    expected = bitforbit.compress_model(copy.deepcopy(plain).float())
    assert layouts(expected) == ["planes"] * 3
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    model.weight.data.copy_(random_bits((64, 64), torch.bfloat16))
    assert type(bitforbit.compress_model(model)) is nn.Linear


@pytest.mark.usefixtures("cpu_is_gpu")
def test_what_a_gpu_encodes_is_what_a_cpu_encodes(monkeypatch: pytest.MonkeyPatch):
    plain = small_model()
    on_gpu = planes_of(bitforbit.compress_model(copy.deepcopy(plain)))
    monkeypatch.undo()
    assert_same_state(on_gpu, planes_of(bitforbit.compress_model(plain)))


# --- ties -------------------------------------------------------------------------------------------------------


def tied_model() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(300, 64), "head": nn.Linear(64, 300, bias=False)}).bfloat16()
    model["head"].weight = model["embed"].weight
    return bitforbit.compress_model(model)


def assert_tied(model: nn.Module) -> None:
    first, second = (model[name]._bitforbit_parts("weight") for name in ("embed", "head"))
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert len(list(model.parameters())) == 4


@pytest.mark.usefixtures("emulated")
def test_ties_stay_ties():
    model = tied_model()
    weight = model["head"].weight.data.clone()
    for name in ("tiles", "planes", "tiles"):
        bnn.set_layout(model, name)
        assert layouts(model) == [name] * 2
        assert_tied(model)
    state = model.state_dict()
    assert state["embed.tails__weight"] is state["head.tails__weight"]
    copied = copy.deepcopy(model)
    assert layouts(copied) == ["tiles"] * 2
    assert_tied(copied)
    assert_tied(pickle.loads(pickle.dumps(model)))
    model.load_state_dict({"embed.weight": weight * 2, "head.weight": weight * 2})
    assert layouts(model) == ["tiles"] * 2
    assert_tied(model)
    for name in ("embed", "head"):
        assert_same_bits(model[name].weight.data, weight * 2)
        assert_same_bits(copied[name].weight.data, weight)
    bitforbit.decompress_model(model)
    assert model["embed"].weight is model["head"].weight


@pytest.mark.usefixtures("emulated")
def test_tying_modules_of_two_layouts():
    model, other = tied_model(), tied_model()
    bnn.set_layout(other, "tiles")
    model["head"].weight = other["embed"].weight
    assert layouts(model) == ["planes", "tiles"]
    assert [name for name, _ in model["head"].named_parameters()] == [
        f"{part}__weight" for part in bnn.TilesSpec.part_names
    ]
    x = gaussian((3, 64))
    assert_same_bits(model["head"](x), other["head"](x))


@pytest.mark.usefixtures("emulated")
def test_a_conversion_is_not_used_again_after_a_change():
    model = tied_model()
    before = model["head"].weight.data.clone()
    bnn.set_layout(model["embed"], "tiles")
    changed = bitforbit.compress_model(nn.Linear(64, 300, bias=False).bfloat16())
    model["head"].load_state_dict(changed.state_dict())
    bnn.set_layout(model["head"], "tiles")
    assert_same_bits(model["head"].weight.data, changed.weight.data)
    assert_same_bits(model["embed"].weight.data, before)


# --- copies and state -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("emulated")
def test_copies():
    model, plain = pair()
    expected = planes_of(model)
    bnn.set_layout(model, "tiles")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied, kind in (
        (copy.deepcopy(model), "tiles"),
        (pickle.loads(pickle.dumps(model)), "planes"),
        (torch.load(buffer, weights_only=False), "planes"),
    ):
        assert layouts(copied) == [kind] * 3
        assert type(copied[1]) is bnn.Linear
        assert_same_bits(copied(IDS), plain(IDS))
        assert_same_state(planes_of(copied), expected)
    assert layouts(model) == ["tiles"] * 3


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_into_tiles(assign: bool):
    model, _ = pair()
    bnn.set_layout(model, "tiles")
    other = small_model()
    for p in other.parameters():
        p.data.mul_(torch.linspace(0.01, 3, p.numel()).view(p.shape).to(p.dtype))
    compressed = bitforbit.compress_model(copy.deepcopy(other))
    for state in (compressed.state_dict(), other.state_dict(), bnn.set_layout(compressed, "tiles").state_dict()):
        result = model.load_state_dict(state, assign=assign)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert layouts(model) == ["tiles"] * 3
        assert_same_bits(model(IDS), other(IDS).detach())
    raw = compressed.state_dict(keep_vars=True)
    assert raw["1.tiles__weight"] is compressed[1].tiles__weight


@pytest.mark.usefixtures("emulated")
def test_state_that_does_not_fit():
    model, plain = pair()
    bnn.set_layout(model, "tiles")
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"1\.weight: expected uint8 parts .* lacks the metadata"):
        model.load_state_dict(dict(state))
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        model.load_state_dict({"1.weight": torch.zeros(3, 3)}, strict=False)
    del state["1.tails__weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1\.tails__weight"\.'):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.* "1\.code__weight", "1\.digits__weight"'):
        model.load_state_dict({})
    assert_same_bits(model(IDS), plain(IDS))


@pytest.mark.usefixtures("emulated")
def test_values_that_tiles_do_not_make_smaller():
    linear = bitforbit.compress_model(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    bnn.set_layout(linear, "tiles")
    values = random_bits((64, 64), torch.bfloat16)
    linear.load_state_dict({"weight": values})
    assert layouts(linear) == ["planes"]
    assert_same_bits(linear.weight.data, values)


# --- other modules ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 90, 64))

    def forward(self, x: torch.Tensor, wanted: list[int]) -> torch.Tensor:
        return sum((nn.functional.linear(x, self.up[i]) for i in wanted), torch.zeros(()))


@pytest.mark.usefixtures("emulated")
def test_stacks_of_experts():
    experts = Experts().bfloat16()
    plain = experts.up.detach().clone()
    x = gaussian((5, 64))
    expected = experts(x, [1, 3]).detach()
    bitforbit.compress_model(experts)
    bnn.set_layout(experts, "tiles")
    assert layouts(experts) == ["tiles"]
    assert_same_bits(experts(x, [1, 3]), expected)
    for wanted in (0, -2, torch.tensor([2, 0, 2])):
        assert_same_bits(experts.up[wanted], plain[wanted])
    offsets = torch.tensor([2, 2, 5, 5], dtype=torch.int32)
    got = nn.functional.grouped_mm(x, experts.up.transpose(-2, -1), offs=offsets)
    assert_same_bits(got, nn.functional.grouped_mm(x, plain.transpose(-2, -1), offs=offsets))
    assert_same_bits(experts.up.data, plain)


@pytest.mark.usefixtures("emulated")
def test_convolutions_and_embeddings_of_other_classes():
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    conv, scaled = nn.Conv2d(16, 32, 3).bfloat16(), Scaled(300, 64).bfloat16()
    for module, x in ((conv, gaussian((1, 16, 9, 9))), (scaled, IDS)):
        expected = module(x).detach()
        bitforbit.compress_model(module)
        bnn.set_layout(module, "tiles")
        assert layouts(module) == ["tiles"]
        assert_same_bits(module(x).detach(), expected)


@pytest.mark.usefixtures("emulated")
def test_gradients():
    model, plain = pair()
    bnn.set_layout(model, "tiles")
    grads = []
    for each in (model, plain):
        x = gaussian((5, 64)).requires_grad_()
        each[3](each[2](each[1](x))).float().square().sum().backward()
        grads.append(x.grad)
    assert_same_bits(*grads)


@pytest.mark.usefixtures("emulated")
def test_compiled():
    model, plain = pair()
    bnn.set_layout(model, "tiles")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same_bits(compiled(IDS), plain(IDS))
