"""Operators on FP16 and FP8 weights in tiles, their kernels emulated; biases of any float in mode fused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.cuda.fused import reference
from bitforbit.cuda.fused.order import choose_order
from bitforbit.cuda.tiles import kinds, naive
from bitforbit.errors import UnsupportedDtypeError, UsageError
from bitforbit.ops import stats
from cuda_shim.emulation import EmulatedLauncher
from torch_helpers import KINDS, assert_same_bits, encode, gaussian, random_bits

ROWS, COLS = 40, 200
DTYPES = [torch.float16, torch.float8_e4m3fn]
F8 = torch.float8_e4m3fn

pytestmark = pytest.mark.usefixtures("emulated")
each = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass
class Case:
    """A weight in tiles."""

    weight: torch.Tensor
    parts: tuple[torch.Tensor, ...]

    @property
    def kind(self) -> str:
        return KINDS[self.weight.dtype]

    def linear(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, mode: str = "exact", group: tuple[int, ...] = ()
    ) -> torch.Tensor:
        rows, cols = self.weight.shape
        return ops.tiles_linear(x, *self.parts, bias, rows, cols, mode, list(group), self.kind)


def bits(tensor: torch.Tensor) -> np.ndarray:
    words = tensor.detach().cpu().contiguous().view(torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16).numpy()
    return words.view(f"u{tensor.dtype.itemsize}")


def case_of(weight: torch.Tensor) -> Case:
    packed = naive.pack(bits(weight), kinds.of(KINDS[weight.dtype]))
    return Case(weight, tuple(torch.from_numpy(part.copy()) for part in packed.values()))


def small(dtype: torch.dtype, shape: tuple[int, ...] = (ROWS, COLS), seed: int = 0) -> torch.Tensor:
    return gaussian(shape, torch.float32, seed).to(dtype)


def x_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    other = torch.bfloat16 if dtype.itemsize == 1 else dtype
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(other)


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return functional.linear(x, weight.to(x.dtype), bias)


def fused(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, group: tuple[int, ...] = ()
) -> torch.Tensor:
    rows, cols = weight.shape
    order = choose_order(group or (rows,), cols, EmulatedLauncher(0).properties)
    outputs = "F16" if x.dtype is torch.float16 else "BF16"
    added = None if bias is None else bias.float().numpy()
    got = reference.linear(bits(x.reshape(-1, cols)), bits(weight.to(x.dtype)), order, added, outputs)
    return torch.from_numpy(got.view(np.int16)).view(x.dtype).view(*x.shape[:-1], rows)


@each
def test_decoding_and_rows(dtype: torch.dtype) -> None:
    for weight in (small(dtype), random_bits((ROWS, COLS), dtype)):
        case = case_of(weight)
        assert_same_bits(ops.tiles_decode(*case.parts, ROWS, COLS, 3, 33, case.kind), weight[3:33])
        ids = torch.tensor([[0, 39], [7, 7]])
        got = ops.tiles_embedding(ids, *case.parts, ROWS, COLS, case.kind)
        assert_same_bits(got.view(torch.uint8), weight.view(torch.uint8)[ids.view(-1)].view(2, 2, -1))


@each
def test_exact_products_have_the_bits_of_torch(dtype: torch.dtype) -> None:
    case = case_of(small(dtype))
    for shape in ((COLS,), (5, COLS), (2, 3, COLS), (70, COLS), (0, COLS)):
        x = x_of(shape, dtype)
        bias = gaussian((ROWS,), x.dtype)
        assert_same_bits(case.linear(x), plain(x, case.weight))
        assert_same_bits(case.linear(x, bias), plain(x, case.weight, bias))


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_fp8_is_cast_to_any_x(x_dtype: torch.dtype, mode: str) -> None:
    case, x = case_of(small(F8)), x_of((5, COLS), x_dtype)
    assert_same_bits(case.linear(x, None, mode), plain(x, case.weight))


@pytest.mark.parametrize("dtype", [F8, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_in_planes_is_cast_to_any_x(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """By the operators of a CPU and of a GPU."""
    weight, x = small(dtype), x_of((5, COLS), x_dtype)
    parts, how = encode(weight)
    assert_same_bits(ops.linear(x, *parts, None, *how, "exact"), plain(x, weight))
    assert_same_bits(ops.gpu.planes.linear(x, *parts, None, *how, "exact"), plain(x, weight))


@each
def test_fused_products(dtype: torch.dtype) -> None:
    case = case_of(small(dtype))
    stats.reset()
    for shape in ((COLS,), (5, COLS), (2, 3, COLS), (64, COLS), (2, 0, COLS)):
        x = x_of(shape, dtype)
        assert_same_bits(case.linear(x, None, "fused"), fused(x, case.weight))
        assert_same_bits(case.linear(x, None, "fused", (ROWS, 3000)), fused(x, case.weight, None, (ROWS, 3000)))
    assert stats.snapshot()["decoded"].linears == 0
    x = x_of((65, COLS), dtype)
    assert_same_bits(case.linear(x, None, "fused"), plain(x, case.weight))


@each
def test_several_at_once(dtype: torch.dtype) -> None:
    cases = [case_of(small(dtype, (rows, COLS), rows)) for rows in (ROWS, 16)]
    x, bias = x_of((5, COLS), dtype), gaussian((16,), torch.float32)
    parts = [part for case in cases for part in case.parts]
    got = ops.tiles_linears(x, parts, [None, bias], [ROWS, 16], COLS, "fused", [], cases[0].kind)
    for one, case, added in zip(got, cases, (None, bias), strict=True):
        assert_same_bits(one, fused(x, case.weight, added, (ROWS, 16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_biases_of_any_float(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    case, bias = case_of(small(dtype)), gaussian((ROWS,), torch.float32).mul(40).to(bias_dtype)
    for tokens in (1, 9):
        x = x_of((tokens, COLS), dtype)
        assert_same_bits(case.linear(x, bias, "fused"), fused(x, case.weight, bias))
    x = x_of((65, COLS), dtype)  # as many tokens as decoded weights are multiplied for
    assert_same_bits(case.linear(x, bias, "fused"), plain(x, case.weight, bias.to(x.dtype)))
    strided = torch.stack([bias, bias], 1)[:, 0]
    x = x[:3]
    assert_same_bits(case.linear(x, strided, "fused"), fused(x, case.weight, bias))


@each
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_gradients(dtype: torch.dtype, mode: str) -> None:
    case = case_of(small(dtype))
    ours, theirs = (x_of((5, COLS), dtype).requires_grad_() for _ in range(2))
    bias, other = (gaussian((ROWS,), ours.dtype).requires_grad_() for _ in range(2))
    case.linear(ours, bias, mode).sum().backward()
    plain(theirs, case.weight, other).sum().backward()
    assert_same_bits(ours.grad, theirs.grad)
    assert_same_bits(bias.grad, other.grad)


@each
def test_autocast(dtype: torch.dtype) -> None:
    """To the dtype of products from tiles, and to another one."""
    case, x = case_of(small(dtype)), torch.randn(5, COLS, generator=torch.Generator().manual_seed(0))
    for target in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", target):
            assert_same_bits(case.linear(x), plain(x.to(target), case.weight))
            whole = target is (torch.float16 if dtype is torch.float16 else torch.bfloat16)
            expected = fused(x.to(target), case.weight) if whole else plain(x.to(target), case.weight)
            assert_same_bits(case.linear(x, None, "fused"), expected)


@each
def test_compile_and_fakes(dtype: torch.dtype) -> None:
    case = case_of(small(dtype))
    x = x_of((3, COLS), dtype)
    step = torch.compile(lambda x: case.linear(x, None, "fused") + 1, fullgraph=True, backend="aot_eager")
    assert_same_bits(step(x), case.linear(x, None, "fused") + 1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.tiles_decode, (*case.parts, ROWS, COLS, 0, ROWS, case.kind), test_utils=tests)
    arguments = (x, *case.parts, None, ROWS, COLS, "fused", [], case.kind)
    torch.library.opcheck(ops.tiles_linear, arguments, test_utils=tests)


@each
def test_from_planes_and_back(dtype: torch.dtype) -> None:
    weight = small(dtype, (64, 512))
    parts, how = encode(weight)
    packed = ops.gpu.planes_to_tiles(parts, *how)
    assert packed is not None
    for got, expected in zip(packed.values(), case_of(weight).parts, strict=True):
        assert_same_bits(got, expected)
    rows_per_table, back = ops.gpu.tiles_to_planes(tuple(packed.values()), 64, 512, KINDS[dtype])
    assert rows_per_table == how[3]
    for got, expected in zip(back.values(), parts, strict=True):
        assert_same_bits(got, expected)
    assert ops.gpu.pack_tiles(random_bits((64, 512), dtype)) is None


def test_refusals() -> None:
    case = case_of(small(torch.float16))
    with pytest.raises(UnsupportedDtypeError, match="expected weights of a kind among"):
        ops.tiles_decode(*case.parts, ROWS, COLS, 0, ROWS, "F32")
    for mode in ("exact", "fused"):
        with pytest.raises(UsageError, match=r"expected x of dtype torch.float16 and shape \[..., 200\]"):
            case.linear(x_of((3, COLS), torch.bfloat16), None, mode)
    with pytest.raises(UsageError, match="expected x of dtype"):
        case_of(small(F8)).linear(x_of((3, COLS), torch.float64))
