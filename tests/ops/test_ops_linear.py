from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.errors import CorruptTensorError, UsageError
from bitforbit.ops import reference, stats
from bitforbit.ops.scratch import SCRATCH
from torch_helpers import assert_same_bits, encode, gaussian, random_bits

ROWS, COLS = 48, 96


def x_of(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(cols: int = COLS, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        "1d": x_of((cols,), dtype),
        "2d": x_of((5, cols), dtype),
        "3d": x_of((2, 5, cols), dtype),
        "4d": x_of((2, 3, 4, cols), dtype),
        "rows apart": x_of((5, 2 * cols), dtype)[:, :cols],
        "columns apart": x_of((5, 2 * cols), dtype)[:, ::2],
        "by columns": x_of((cols, 5), dtype).t(),
        "3d swapped": x_of((5, 2, cols), dtype).transpose(0, 1),
        "3d rows apart": x_of((2, 5, 2 * cols), dtype)[:, :, :cols],
        "3d batches apart": x_of((2, 10, cols), dtype)[:, :5],
        "3d by columns": x_of((2, cols, 5), dtype).transpose(1, 2),
        "3d expanded": x_of((1, 5, cols), dtype).expand(3, 5, cols),
        "4d swapped": x_of((2, 4, 3, cols), dtype).transpose(1, 2),
        "no tokens": x_of((0, cols), dtype),
        "3d no tokens": x_of((2, 0, cols), dtype),
        "long": x_of((3, 70, cols), dtype),
    }


NAMES = list(inputs())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_exact_has_the_bits_of_torch(name, with_bias, dtype):
    weight, bias = gaussian((ROWS, COLS), dtype), gaussian((ROWS,), dtype, 3) if with_bias else None
    parts, how = encode(weight)
    x = inputs(dtype=dtype)[name]
    assert_same_bits(ops.linear(x, *parts, bias, *how, "exact"), functional.linear(x, weight, bias))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gradient", ["random", "expanded", "strided"])
def test_gradients_have_the_bits_of_torch(name, with_bias, gradient):
    weight = gaussian((ROWS, COLS))
    parts, how = encode(weight)
    results = []
    for ours in (True, False):
        x = inputs()[name].requires_grad_()
        bias = gaussian((ROWS,), seed=3).requires_grad_() if with_bias else None
        y = ops.linear(x, *parts, bias, *how, "exact") if ours else functional.linear(x, weight, bias)
        if gradient == "random":
            grad = x_of(tuple(y.shape), seed=5)
        elif gradient == "expanded":
            grad = torch.tensor(0.37, dtype=y.dtype).expand(y.shape)
        else:
            grad = x_of((*y.shape[:-1], 2 * ROWS), seed=6)[..., ::2]
        results.append([y, *torch.autograd.grad(y, [t for t in (x, bias) if t is not None], grad)])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


def test_only_the_bias_needs_a_gradient():
    weight, x = gaussian((ROWS, COLS)), x_of((5, COLS))
    parts, how = encode(weight)
    ours, theirs = (gaussian((ROWS,)).requires_grad_() for _ in range(2))
    ops.linear(x, *parts, ours, *how, "exact").sum().backward()
    functional.linear(x, weight, theirs).sum().backward()
    assert_same_bits(ours.grad, theirs.grad)


@pytest.mark.parametrize("mode", ops.MODES)
def test_no_decoded_weight_is_saved(mode):
    parts, how = encode(gaussian((ROWS, COLS)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.linear(x_of((5, COLS)).requires_grad_(), *parts, None, *how, mode)
    assert {t.data_ptr() for t in saved} <= {part.data_ptr() for part in parts}
    y.sum().backward()


def test_double_backward():
    weight = gaussian((ROWS, COLS))
    parts, how = encode(weight)
    results = []
    for ours in (True, False):
        x = x_of((5, COLS)).requires_grad_()
        y = ops.linear(x, *parts, None, *how, "exact") if ours else functional.linear(x, weight)
        (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.pow(2).sum(), x)[0])
    assert_same_bits(*results)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 32), (17, 65), (48, 96), (5, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_has_the_bits_of_the_reference(rows, cols, dtype, with_bias):
    weight = gaussian((rows, cols))
    parts, how = encode(weight.to(dtype), "BF16")
    bias = gaussian((rows,), dtype, 3) if with_bias else None
    for tokens in (1, 3):
        x = x_of((tokens, cols), dtype)
        expected = reference.lanes(x, weight, bias)
        assert_same_bits(ops.linear(x, *parts, bias, *how, "fused"), expected)
        torch.testing.assert_close(expected, functional.linear(x, weight.to(dtype), bias), atol=0.02, rtol=0.02)


def test_reference_on_all_patterns():
    """NaNs stay NaNs; infinities, zeros and denormals keep their bits."""
    weight, x = random_bits((40, 96), torch.bfloat16), random_bits((3, 96), torch.bfloat16, 1)
    weight[::2] = torch.where(weight[::2].isfinite(), weight[::2], 1.0)
    x[1] = torch.where(x[1].isfinite(), x[1], -1.0)
    parts, how = encode(weight)
    got, expected = ops.linear(x, *parts, None, *how, "fused"), reference.lanes(x, weight, None)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got.nan_to_num(0.5), expected.nan_to_num(0.5))


@pytest.mark.parametrize("name", NAMES)
def test_fused_of_any_strides(name):
    weight, bias = gaussian((ROWS, COLS)), gaussian((ROWS,), seed=3)
    parts, how = encode(weight)
    x = inputs()[name]
    expected = ops.linear(x.contiguous().view(-1, COLS), *parts, bias, *how, "fused").view(*x.shape[:-1], ROWS)
    assert_same_bits(ops.linear(x, *parts, bias, *how, "fused"), expected)


def test_linear_refuses():
    parts, how = encode(gaussian((ROWS, COLS)))
    x = x_of((5, COLS))
    with pytest.raises(UsageError, match="a mode among exact, fused, got 'quick'"):
        ops.linear(x, *parts, None, *how, "quick")
    with pytest.raises(UsageError, match=r"shape \[..., 96\], got torch.bfloat16 and \(5, 95\)"):
        ops.linear(x[:, 1:], *parts, None, *how, "exact")
    with pytest.raises(UsageError, match=r"expected x of dtype torch\.bfloat16"):
        ops.linear(x.float(), *parts, None, *how, "exact")
    for mode in ops.MODES:
        with pytest.raises(CorruptTensorError):
            ops.linear(x, parts[0], parts[1][64:].clone(), *parts[2:], None, *how, mode)
        with pytest.raises(UsageError, match="code to be contiguous uint8"):
            ops.linear(x, parts[0].int(), *parts[1:], None, *how, mode)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(mode, with_bias):
    parts, how = encode(gaussian((ROWS, COLS)))
    bias = gaussian((ROWS,)).requires_grad_() if with_bias else None
    torch.library.opcheck(ops.linear, (x_of((2, 3, COLS)).requires_grad_(), *parts, bias, *how, mode))


def test_opcheck_of_strided_input():
    parts, how = encode(gaussian((ROWS, COLS)))
    x = inputs()["3d swapped"].requires_grad_()
    torch.library.opcheck(ops.linear, (x, *parts, None, *how, "exact"))


@pytest.mark.parametrize("mode", ops.MODES)
def test_autocast(mode):
    """As nn.Linear: x is cast to the dtype of autocast, gradients come back in the dtype of x."""
    weight = gaussian((ROWS, COLS))
    parts, how = encode(weight)
    bias = gaussian((ROWS,), torch.float32)
    ours, theirs = (x_of((5, COLS), torch.float32).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(ours, *parts, bias, *how, mode)
        expected = functional.linear(theirs, weight, bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    if mode == "exact":
        assert_same_bits(y, expected)
    y.float().sum().backward()
    expected.float().sum().backward()
    assert_same_bits(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_to_another_dtype_than_the_weight(dtype):
    weight = gaussian((ROWS, COLS), dtype)
    parts, how = encode(weight)
    x = x_of((5, COLS), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(ops.linear(x, *parts, None, *how, "exact"), functional.linear(x, weight))


def test_stats():
    parts, how = encode(gaussian((ROWS, COLS)))
    stats.reset()
    for mode in ("exact", "fused", "fused"):
        ops.linear(x_of((5, COLS)), *parts, None, *how, mode)
    counts = stats.snapshot()
    assert counts["fused"] == stats.Count(2, 2 * ROWS * COLS * 2)
    assert counts["decoded"].linears + counts["fused_exact"].linears == 1
    stats.reset()
    assert stats.snapshot() == {way: stats.Count() for way in stats.WAYS}


def test_thread_counts():
    parts, how = encode(gaussian((ROWS, COLS)))
    x, before = x_of((5, COLS)), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, *parts, None, *how, "fused"))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*results)


@pytest.mark.parametrize("mode", ops.MODES)
def test_aot_compile_without_breaks(mode):
    weight = gaussian((ROWS, COLS))
    parts, how = encode(weight)

    def step(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h = ops.embedding(ids, *parts, "BF16", ROWS, COLS, how[3], torch.bfloat16)
        return ops.linear(h + x, *parts, None, *how, mode).relu() @ ops.decode(*parts, *how, 0, ROWS)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5):
        ids = torch.arange(tokens)
        ours, theirs = (x_of((tokens, COLS)).requires_grad_() for _ in range(2))
        got, expected = compiled(ours, ids), step(theirs, ids)
        assert_same_bits(got, expected)
        got.sum().backward()
        expected.sum().backward()
        assert_same_bits(ours.grad, theirs.grad)


def test_fused_has_the_same_gradients():
    parts, how = encode(gaussian((ROWS, COLS)))
    grads = []
    for mode in ops.MODES:
        x = x_of((2, 5, COLS)).requires_grad_()
        grads += torch.autograd.grad(ops.linear(x, *parts, None, *how, mode), x, x_of((2, 5, ROWS), seed=4))
    assert_same_bits(*grads)


def test_scratch_filled_in_inference_mode_serves_training():
    SCRATCH.clear()
    weight = gaussian((ROWS, COLS))
    parts, how = encode(weight)
    with torch.inference_mode():
        ops.linear(x_of((5, COLS)), *parts, None, *how, "exact")
    x = x_of((5, COLS)).requires_grad_()
    y = ops.linear(x, *parts, None, *how, "exact")
    y.sum().backward()
    assert_same_bits(y, functional.linear(x, weight))


def test_export():
    parts, how = encode(gaussian((ROWS, COLS)))

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.linear(x, *parts, None, *how, "exact")

    x = x_of((5, COLS))
    assert_same_bits(torch.export.export(Module(), (x,)).module()(x), Module()(x))
