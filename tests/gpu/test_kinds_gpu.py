"""FP16 and FP8 weights in tiles on a real GPU: torch's bits in exact mode, in mode fused those of the plain kernel."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

import bitforbit
from bitforbit import ops
from bitforbit.cuda.fused import linear as kernels
from bitforbit.cuda.fused.order import Order
from bitforbit.ops.gpu import fused, queues
from torch_helpers import KINDS, assert_same_bits

DEVICE = torch.device("cuda", 0)
F8 = torch.float8_e4m3fn
DTYPES = [torch.float16, F8]
SHAPES = [(48, 200), (1024, 4096), (4096, 1024), (1000, 1001), (129, 14336)]
each = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    ops.gpu.check_status(DEVICE)
    ops.gpu.clear()


def weight_of(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return (torch.randn((rows, cols), generator=generator, device=DEVICE) * 0.02).to(dtype)


def x_of(tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn((tokens, cols), generator=torch.Generator().manual_seed(1))
    return x.to(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(DEVICE)


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same sums, from weights in the dtype of x."""
    rows, cols = weight.shape
    queue = queues.queue_for(DEVICE)
    order = fused.order_of((rows,), cols, queue.properties)
    if order.instruction != Order.instruction:
        pytest.skip(f"the kernel for plain weights has no {order.instruction}")
    out, cast = torch.empty((len(x), rows), dtype=x.dtype, device=DEVICE), weight.to(x.dtype)
    at, bias_type = (0, None) if bias is None else (bias.data_ptr(), KINDS[bias.dtype])
    kernels.plain(
        queue, cast.data_ptr(), rows, order, at, x.data_ptr(), len(x), out.data_ptr(), KINDS[x.dtype], bias_type
    )
    return out


@each
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_products(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    weight, (rows, cols) = weight_of(*shape, dtype), shape
    packed = ops.gpu.pack_tiles(weight)
    if packed is None:
        pytest.skip("not smaller")
    parts, kind, x = tuple(packed.values()), KINDS[dtype], x_of(tokens, cols, dtype)
    assert_same_bits(ops.tiles_decode(*parts, rows, cols, 0, rows, kind).view(torch.uint8), weight.view(torch.uint8))
    for bias in (
        None,
        *(torch.randn(rows, device=DEVICE).to(t) for t in (torch.bfloat16, torch.float16, torch.float32)),
    ):
        got = ops.tiles_linear(x, *parts, bias, rows, cols, "fused", [], kind)
        assert_same_bits(got, plain(x, weight, bias))
    got = ops.tiles_linear(x, *parts, None, rows, cols, "fused", [], kind).double()
    whole = x.double() @ weight.to(x.dtype).double().T
    theirs = functional.linear(x, weight.to(x.dtype))
    assert (got - whole).square().mean() <= 1.1 * (theirs.double() - whole).square().mean() + 1e-30
    exact = ops.tiles_linear(x, *parts, None, rows, cols, "exact", [], kind)
    assert_same_bits(exact, theirs)


@each
def test_every_pattern(dtype: torch.dtype) -> None:
    """Each weight times one is itself: subnormals too, in FP8 by a multiplication by 2^120."""
    count = 1 << 8 * dtype.itemsize
    integers = torch.arange(count, dtype=torch.int64, device=DEVICE)
    words = integers.to(torch.uint8) if dtype.itemsize == 1 else (integers - (integers >> 15 << 16)).to(torch.int16)
    weight = torch.zeros((count, 16 * 64), dtype=words.dtype, device=DEVICE)
    weight[:, 5] = words
    packed = ops.gpu.pack_tiles(weight.view(dtype))
    assert packed is not None
    x = torch.zeros(1, weight.shape[1], device=DEVICE)
    x[0, 5] = 1
    x = x.to(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    got = ops.tiles_linear(x, *packed.values(), None, *weight.shape, "fused", [], KINDS[dtype])[0]
    value = words.view(dtype).to(x.dtype)
    nan = value.isnan()
    assert bool(got[nan].isnan().all())
    assert torch.equal(got[~nan], value[~nan])


def test_fp16_models_move_to_the_gpu_and_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3000, 512), nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).half()
    plain_model = copy.deepcopy(model).to(DEVICE).requires_grad_(False)
    files = {name: value.clone() for name, value in bitforbit.compress_model(model).state_dict().items()}
    model.to(DEVICE)
    assert model[1]._bitforbit_specs["weight"].layout == "tiles"
    ids = torch.arange(24, device=DEVICE).view(2, 12)
    assert_same_bits(model(ids), plain_model(ids))
    model.to("cpu")
    for name, value in files.items():
        assert_same_bits(model.state_dict()[name], value)
