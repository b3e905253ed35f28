"""Modules with FP16 and FP8 weights in tiles, on CPU tensors through the emulation."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

import bitforbit
from bitforbit import nn as bnn
from bitforbit.ops import gpu
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from torch_helpers import assert_same_bits, gaussian

IDS = torch.tensor([[0, 17, 299], [5, 5, 18]])
F8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def emulated() -> Iterator[EmulatedLauncher]:
    launcher = EmulatedLauncher(3)
    with gpu.emulate(EmulatedQueue(launcher)):
        yield launcher
        gpu.clear()


def fp16_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(300, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False), nn.LayerNorm(64)
    )
    return model.half().requires_grad_(False)


def fp8_linear(rows: int, cols: int, bias: bool = True) -> nn.Linear:
    """Weights in FP8, a bias in BF16: such a module runs compressed alone."""
    linear = nn.Linear(cols, rows, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight = nn.Parameter(gaussian((rows, cols), torch.float32, rows).to(F8), requires_grad=False)
    return linear


def layouts(model: nn.Module) -> list[str]:
    return [spec.layout for m in model.modules() for spec in bnn.compressed_parameters(m).values()]


def test_fp16_models() -> None:
    plain = fp16_model()
    model = bitforbit.compress_model(copy.deepcopy(plain))
    files = {name: value.clone() for name, value in model.state_dict().items()}
    bnn.set_layout(model, "tiles")
    assert layouts(model) == ["tiles"] * 3
    assert_same_bits(model(IDS), plain(IDS))
    for i in (0, 1, 3):
        assert_same_bits(model[i].weight.data, plain[i].weight)
    state = model.state_dict()
    assert list(state) == list(files)
    for name, value in files.items():
        assert_same_bits(state[name], value)
    other = bitforbit.compress_model(fp16_model())
    bnn.set_layout(other, "tiles")
    other.load_state_dict(state)
    assert layouts(other) == ["tiles"] * 3
    bnn.set_layout(other, "planes")
    for name, value in files.items():
        assert_same_bits(dict(other.named_parameters())[name], value)
    bitforbit.decompress_model(model)
    assert_same_bits(model(IDS), plain(IDS))


@pytest.mark.parametrize("layout", ["planes", "tiles"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_linears(layout: str, x_dtype: torch.dtype) -> None:
    """What ``functional.linear(x, weight.to(x.dtype), bias)`` gives."""
    plain = fp8_linear(96, 64, bias=False)
    linear = copy.deepcopy(plain)
    assert bnn.compress_parameter(linear, "weight")
    expected = {name: value.clone() for name, value in linear.state_dict().items()}
    bnn.set_layout(linear, layout)
    assert layouts(linear) == [layout]
    x = gaussian((2, 3, 64)).to(x_dtype)
    assert_same_bits(linear(x), functional.linear(x, plain.weight.to(x_dtype)))
    assert_same_bits(linear.weight.data.view(torch.uint8), plain.weight.data.view(torch.uint8))
    assert linear.weight.dtype == F8
    for name, value in expected.items():
        assert_same_bits(linear.state_dict()[name], value)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    assert_same_bits(torch.load(file, weights_only=False)(x), linear(x))


class Gated(nn.Module):
    """Two linears with one input, of dtypes that may differ."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.gate_proj(x), self.up_proj(x)], -1)


@pytest.mark.parametrize("dtype", [torch.float16, F8], ids=str)
def test_siblings(dtype: torch.dtype, emulated: EmulatedLauncher) -> None:
    if dtype == F8:
        model = Gated(fp8_linear(96, 640), fp8_linear(128, 640, bias=False))
    else:
        model = Gated(nn.Linear(640, 96), nn.Linear(640, 128, bias=False)).half().requires_grad_(False)
    bnn.set_layout(bitforbit.compress_model(model, mode="fused"), "tiles")
    assert layouts(model) == ["tiles"] * 2
    x = gaussian((3, 640), torch.bfloat16 if dtype == F8 else dtype)
    with torch.no_grad():
        first = model(x)
        emulated.launches.clear()
        assert_same_bits(model(x), first)
    assert [kernel for kernel, _ in emulated.launches] == ["fused_linear"]
    with gpu.use_policy(gpu.Policy(grouped=False)):
        assert_same_bits(model(x), first)
    other = x.to(torch.float32)
    if dtype == F8:
        x32 = torch.cat([functional.linear(other, m.weight.float()) for m in (model.gate_proj, model.up_proj)], -1)
        model.gate_proj.bias = None
        assert_same_bits(model(other), x32)


def test_linears_of_two_kinds_are_no_siblings() -> None:
    model = Gated(fp8_linear(96, 640), nn.Linear(640, 96, dtype=torch.bfloat16).requires_grad_(False))
    bnn.set_layout(bitforbit.compress_model(model, mode="fused"), "tiles")
    assert model.gate_proj._bitforbit_siblings is None
    x = gaussian((3, 640))
    parts = [functional.linear(x, m.weight.to(x.dtype), m.bias) for m in (model.gate_proj, model.up_proj)]
    for _ in range(2):
        torch.testing.assert_close(model(x), torch.cat(parts, -1))
