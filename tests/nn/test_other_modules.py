"""Modules of torch whose own code reads the compressed weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import bitforbit
from bitforbit import nn as bnn
from torch_helpers import assert_same_bits, gaussian

IDS = torch.tensor([[1, 2, 250, 3], [17, 17, 5, 0]])


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


MODULES = {
    "conv1d": (lambda: nn.Conv1d(32, 48, 3), lambda: (x(2, 32, 20),)),
    "conv2d": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2), lambda: (x(2, 16, 9, 9),)),
    "conv3d": (lambda: nn.Conv3d(8, 16, 3), lambda: (x(1, 8, 5, 5, 5),)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 32, 3), lambda: (x(2, 16, 9, 9),)),
    "bilinear": (lambda: nn.Bilinear(32, 16, 24), lambda: (x(5, 32), x(5, 16))),
    "bag": (lambda: nn.EmbeddingBag(300, 64), lambda: (IDS,)),
    "embedding": (lambda: nn.Embedding(300, 64, padding_idx=3, scale_grad_by_freq=True), lambda: (IDS,)),
    "attention": (lambda: nn.MultiheadAttention(64, 4, batch_first=True), lambda: (x(2, 7, 64),) * 3),
    "attention of other sizes": (
        lambda: nn.MultiheadAttention(64, 4, kdim=48, vdim=32, batch_first=True),
        lambda: (x(2, 7, 64), x(2, 5, 48), x(2, 5, 32)),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True), 2),
        lambda: (x(2, 7, 64),),
    ),
    "decoder": (lambda: nn.TransformerDecoderLayer(64, 4, 128, 0.0), lambda: (x(7, 2, 64), x(5, 2, 64))),
    "lstm": (lambda: nn.LSTM(64, 64), lambda: (x(5, 2, 64),)),
}


def flat(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in flat(part)] if isinstance(result, tuple) else []


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("way", ["eval", "eval with gradients", "train"])
def test_outputs_and_gradients(name, way):
    make, arguments = MODULES[name]
    torch.manual_seed(0)
    plain = make().bfloat16().requires_grad_(False).train(way == "train")
    model = bitforbit.compress_model(copy.deepcopy(plain))
    changed = any(isinstance(m, bnn.Compressed) for m in model.modules())
    assert changed == (name != "lstm")
    results = []
    with torch.set_grad_enabled(way != "eval"):
        for module in (model, plain):
            inputs = arguments()
            leaves = [] if way == "eval" else [t.requires_grad_() for t in inputs if t.is_floating_point()]
            outputs = flat(module(*inputs))
            if leaves:
                outputs += torch.autograd.grad(outputs[0].float().square().sum(), leaves[0])
            results.append(outputs)
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)
    bitforbit.decompress_model(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize(
    "normalize", [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal]
)
def test_computed_weights_stay_plain(normalize, caplog):
    model = nn.Sequential(normalize(nn.Linear(64, 64)), nn.Linear(64, 64))
    expected = model.eval()(gaussian((2, 64), torch.float32)).detach()
    with caplog.at_level("INFO", "bitforbit"):
        bitforbit.compress_model(model)
    assert [isinstance(m, bnn.Compressed) for m in model] == [False, True]
    assert "left plain" in caplog.text
    assert_same_bits(model(gaussian((2, 64), torch.float32)).detach(), expected)


def test_parametrization_of_a_compressed_weight_is_refused():
    linear = nn.Linear(64, 64)
    bnn.compress_parameter(linear, "weight")
    with pytest.raises(ValueError, match="does not have a parameter"):
        parametrize.register_parametrization(linear, "weight", nn.Identity())


def test_embedding_that_changes_its_weight_stays_plain():
    model = bitforbit.compress_model(nn.Embedding(300, 64, max_norm=1.0))
    assert type(model) is nn.Embedding


def test_subclasses_use_our_products():
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 3

    class Same(nn.Linear):
        pass

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.weight * 2, self.bias)

    torch.manual_seed(0)
    plain = nn.Sequential(Scaled(300, 64), Same(64, 64), Own(64, 64)).bfloat16()
    model = bitforbit.compress_model(copy.deepcopy(plain))
    assert [isinstance(m, bnn.Linear) for m in model] == [False, True, False]
    assert [isinstance(m, type(p)) for m, p in zip(model, plain, strict=True)] == [True] * 3
    assert [type(m).__name__ for m in model] == ["Scaled", "Same", "Own"]
    assert_same_bits(model(IDS).detach(), plain(IDS).detach())
    model[0].tails__weight.data[-64:] = 255  # damage to the last rows: the rows asked for are still right
    assert_same_bits(model(IDS[1]).detach(), plain(IDS[1]).detach())


def test_several_parameters_of_one_module():
    torch.manual_seed(0)
    plain = nn.Linear(64, 1024).bfloat16()
    model = copy.deepcopy(plain)
    for name in ("weight", "bias"):
        assert bnn.compress_parameter(model, name)
    assert sorted(bnn.compressed_parameters(model)) == ["bias", "weight"]
    assert isinstance(model, bnn.Linear)
    assert_same_bits(model(x(3, 64)).detach(), plain(x(3, 64)).detach())
    assert_same_bits(copy.deepcopy(model)(x(3, 64)).detach(), plain(x(3, 64)).detach())
    bnn.decompress_parameter(model, "weight")
    assert not isinstance(model, bnn.Linear)
    assert_same_bits(model(x(3, 64)).detach(), plain(x(3, 64)).detach())
    bnn.decompress_parameter(model, "bias")
    assert type(model) is nn.Linear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.stack = nn.Parameter(torch.randn(3, 64, 64) / 8)
        self.head = nn.Linear(64, 300)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        h = h + functional.linear(h, self.stack[1]) + functional.linear(h, self.head.weight[:64])
        return self.head(h)


@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_compile_without_breaks(mode):
    torch.manual_seed(0)
    model = bitforbit.compress_model(Net().bfloat16().requires_grad_(False), mode=mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(IDS), model(IDS))


def test_compile_with_inductor():
    torch.manual_seed(0)
    model = bitforbit.compress_model(nn.Linear(64, 96).bfloat16())
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_same_bits(compiled(x(3, 64)), model(x(3, 64)))
