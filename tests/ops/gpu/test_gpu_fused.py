"""Operators on tiles in mode fused, their kernels emulated: the reference's bits, and what is kept between calls."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.cuda.fused import reference
from bitforbit.cuda.fused.order import choose_order
from bitforbit.cuda.fused.plan import ARRIVED_BYTES
from bitforbit.errors import CorruptTensorError, UsageError
from bitforbit.ops import direct, stats
from bitforbit.ops.gpu import fused, queues, runtime
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from helpers.gpu_weights import tiles, words
from torch_helpers import assert_same_bits, gaussian

ROWS, COLS = 40, 200

pytestmark = pytest.mark.usefixtures("emulated")


def x_of(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: tuple[int, ...] = ()
) -> np.ndarray:
    rows, cols = weight.shape
    order = choose_order(group or (rows,), cols, EmulatedLauncher(0).properties)
    return reference.linear(words(x.reshape(-1, cols)), words(weight), order, None if bias is None else words(bias))


def inputs() -> dict[str, torch.Tensor]:
    return {
        "1d": x_of((COLS,)),
        "2d": x_of((5, COLS)),
        "3d": x_of((2, 3, COLS)),
        "3d swapped": x_of((3, 2, COLS)).transpose(0, 1),
        "by columns": x_of((COLS, 5)).t(),
        "at an odd address": x_of((5 * COLS + 1,))[1:].view(5, COLS),
        "no tokens": x_of((2, 0, COLS)),
        "64 tokens": x_of((64, COLS)),
    }


def together(cases, x, biases, group=()):
    parts = [part for case in cases for part in case.parts]
    return ops.tiles_linears(x, parts, biases, [len(case.weight) for case in cases], COLS, "fused", group)


@pytest.mark.parametrize("name", list(inputs()))
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_reference_s_bits(name, with_bias):
    case = tiles(gaussian((ROWS, COLS)))
    bias = gaussian((ROWS,), seed=3) if with_bias else None
    x = inputs()[name]
    stats.reset()
    got = case.linear(x, bias, "fused")
    assert got.shape == (*x.shape[:-1], ROWS)
    np.testing.assert_array_equal(words(got.reshape(-1, ROWS)), expected(x, case.weight, bias))
    torch.testing.assert_close(got, functional.linear(x, case.weight, bias), atol=0.02, rtol=0.02)
    assert stats.snapshot()["fused"] == stats.Count(1, 2 * ROWS * COLS)


def test_more_tokens_have_the_bits_of_torch():
    case = tiles(gaussian((ROWS, COLS)))
    x = x_of((65, COLS))
    stats.reset()
    assert_same_bits(case.linear(x, None, "fused"), functional.linear(x, case.weight))
    (product,) = together([case], x, [None])
    assert_same_bits(product, functional.linear(x, case.weight))
    assert stats.snapshot()["decoded"].linears == 2


def test_a_token_in_any_company():
    case, x = tiles(gaussian((ROWS, COLS))), x_of((64, COLS))
    whole = case.linear(x, None, "fused")
    for tokens in (1, 2, 8, 9, 33, 63):
        assert_same_bits(case.linear(x[-tokens:], None, "fused"), whole[-tokens:])
    padded = torch.cat([torch.zeros(9, COLS, dtype=torch.bfloat16), x[:5]])
    assert_same_bits(case.linear(padded, None, "fused")[9:], whole[:5])
    assert_same_bits(case.linear(x, None, "fused"), whole)


def test_a_group():
    cases = [tiles(gaussian((rows, COLS), seed=rows)) for rows in (ROWS, 129, 16)]
    biases = [gaussian((ROWS,), seed=3), None, gaussian((16,), seed=4)]
    x = x_of((2, 3, COLS))
    for group in ((), (ROWS, 129, 16, 4096)):
        products = together(cases, x, biases, group)
        for case, bias, got in zip(cases, biases, products, strict=True):
            group = group or (ROWS, 129, 16)
            np.testing.assert_array_equal(words(got.view(6, -1)), expected(x, case.weight, bias, group))
            single = ops.tiles_linear(x, *case.parts, bias, *case.fields, "fused", group)
            assert_same_bits(got, single)
    exact = ops.tiles_linears(x, [p for c in cases for p in c.parts], biases, [ROWS, 129, 16], COLS, "exact")
    for case, bias, got in zip(cases, biases, exact, strict=True):
        assert_same_bits(got, functional.linear(x, case.weight, bias))


def test_results_of_a_direct_call_are_no_views():
    cases = [tiles(gaussian((rows, COLS), seed=rows)) for rows in (ROWS, 16)]
    matrices = [fused.Matrix(case.parts, len(case.weight), None) for case in cases]
    first, second = direct.ordinary_tiles_linears(x_of((2, COLS)), matrices, COLS, (ROWS, 16))
    assert not any(each._is_view() for each in (first, second))
    version = second._version
    first.zero_()
    assert second._version == version
    assert_same_bits(second, together(cases, x_of((2, COLS)), [None, None])[1])


@pytest.mark.parametrize("name", ["1d", "3d", "3d swapped", "by columns"])
@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_are_those_of_exact_mode(name, grouped):
    cases = [tiles(gaussian((rows, COLS), seed=rows)) for rows in (ROWS, 16)]
    grads = []
    for mode in ("exact", "fused"):
        x = inputs()[name].requires_grad_()
        bias = gaussian((ROWS,), seed=3).requires_grad_()
        if grouped and mode == "fused":
            a, b = together(cases, x, [bias, None])
        else:
            a, b = cases[0].linear(x, bias, mode), cases[1].linear(x, None, mode)
        ones = [x_of(tuple(y.shape), seed=7) for y in (a, b)]
        grads.append(torch.autograd.grad([a, b], [x, bias], ones))
    for ours, theirs in zip(*grads, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias):
    case = tiles(gaussian((ROWS, COLS)))
    bias = gaussian((ROWS,)).requires_grad_() if with_bias else None
    x = x_of((2, 3, COLS)).requires_grad_()
    torch.library.opcheck(ops.tiles_linear, (x, *case.parts, bias, *case.fields, "fused", [ROWS, 16]))
    other = tiles(gaussian((16, COLS)))
    torch.library.opcheck(ops.tiles_linears, (x, [*case.parts, *other.parts], [bias, None], [ROWS, 16], COLS, "fused"))
    torch.library.opcheck(
        ops.tiles_linears, (x.detach(), [*case.parts, *other.parts], [None, None], [ROWS, 16], COLS, "fused")
    )


def test_autocast():
    cases = [tiles(gaussian((rows, COLS), seed=rows)) for rows in (ROWS, 16)]
    x, bias = x_of((5, COLS)).float(), gaussian((ROWS,), torch.float32)
    expected = together(cases, x.bfloat16(), [bias.bfloat16(), None])
    with torch.autocast("cpu", torch.bfloat16):
        for got, each in zip(together(cases, x, [bias, None]), expected, strict=True):
            assert_same_bits(got, each)
        single = ops.tiles_linear(x, *cases[0].parts, bias, *cases[0].fields, "fused", [ROWS, 16])
        assert_same_bits(single, expected[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_breaks(backend):
    case, other = tiles(gaussian((COLS, COLS))), tiles(gaussian((16, COLS)))

    def step(x: torch.Tensor) -> torch.Tensor:
        a, b = ops.tiles_linears(
            case.linear(x, None, "fused").relu(), [*case.parts, *other.parts], [None, None], [COLS, 16], COLS, "fused"
        )
        return torch.cat([a, b], -1)

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    for tokens in (3, 5) if backend == "aot_eager" else (3,):
        ours, theirs = (x_of((tokens, COLS)).requires_grad_() for _ in range(2))
        got, expected = compiled(ours), step(theirs)
        assert_same_bits(got, expected)
        got.sum().backward()
        expected.sum().backward()
        if backend == "aot_eager":  # inductor adds within the second product
            assert_same_bits(ours.grad, theirs.grad)
        torch.testing.assert_close(ours.grad, theirs.grad, atol=0.05, rtol=0.05)


def test_fakes():
    meta = [torch.empty(16, dtype=torch.uint8, device="meta") for _ in range(8)]
    x = torch.zeros(2, 3, COLS, dtype=torch.bfloat16, device="meta")
    shapes = [y.shape for y in ops.tiles_linears(x, meta, [None, None], [ROWS, 16], COLS, "fused")]
    assert shapes == [(2, 3, ROWS), (2, 3, 16)]


def test_refusals():
    case = tiles(gaussian((ROWS, COLS)))
    x = x_of((5, COLS))
    for bias in (gaussian((ROWS,), torch.float64), gaussian((ROWS + 1,))):
        with pytest.raises(UsageError, match=r"expected a bias in BF16, FP16 or FP32 of shape \(40,\)"):
            case.linear(x, bias, "fused")
    with pytest.raises(UsageError, match=r"shape \[..., 200\]"):
        case.linear(x[:, 1:], None, "fused")
    with pytest.raises(UsageError, match="a mode among exact, fused"):
        ops.tiles_linears(x, case.parts, [None], [ROWS], COLS, "quick")
    with pytest.raises(UsageError, match="expected four parts, a number of rows and a bias or None for each"):
        ops.tiles_linears(x, case.parts, [None, None], [ROWS], COLS, "fused")
    with pytest.raises(CorruptTensorError):
        ops.tiles_linear(x, case.parts[0][:-1408].clone(), *case.parts[1:], None, *case.fields, "fused")
    with pytest.raises(UsageError, match="to be contiguous uint8 of one dimension"):
        ops.tiles_linear(x, case.parts[0].int(), *case.parts[1:], None, *case.fields, "fused")


# --- what is kept -----------------------------------------------------------------------------------------------


def test_tables_are_made_once_and_go_with_their_weights(monkeypatch):
    uploads = []
    upload = queues.EmulatedTorchQueue.upload
    monkeypatch.setattr(
        queues.EmulatedTorchQueue, "upload", lambda self, data: uploads.append(len(data)) or upload(self, data)
    )
    case, bias = tiles(gaussian((ROWS, COLS), seed=11)), gaussian((ROWS,), seed=3)
    uploads.clear()
    for tokens in (1, 5, 64, 5):
        case.linear(x_of((tokens, COLS)), None, "fused")
    assert len(uploads) == 1
    case.linear(x_of((5, COLS)), bias, "fused")
    assert len(uploads) == 2
    weight = fused._tables[next(reversed(fused._tables))].storage
    assert not weight.expired()
    del case
    gc.collect()
    assert weight.expired()
    monkeypatch.setattr(fused, "_sweep_at", [0])
    fused._sweep()
    assert all(not entry.storage.expired() for entry in fused._tables.values())


def test_changes_in_place_are_seen():
    case, other = tiles(gaussian((ROWS, COLS))), tiles(-gaussian((ROWS, COLS)))
    x, bias = x_of((2, COLS)), gaussian((ROWS,), seed=3)
    case.linear(x, bias, "fused")
    for mine, theirs in zip(case.parts, other.parts, strict=True):
        mine.copy_(theirs)
    bias.mul_(2)
    assert_same_bits(case.linear(x, bias, "fused"), other.linear(x, bias.clone(), "fused"))


def test_parts_and_biases_where_kernels_cannot_read_them():
    case, other = tiles(gaussian((ROWS, COLS))), tiles(-gaussian((ROWS, COLS)))
    x, wide = x_of((2, COLS)), gaussian((2 * ROWS,), seed=3)
    memory = [torch.empty(part.numel() + 8, dtype=torch.uint8) for part in case.parts]
    views = [each[8 - each.data_ptr() % 8 :][: part.numel()] for each, part in zip(memory, case.parts, strict=True)]
    for source, bias in ((case, wide[::2]), (other, wide[1::2])):
        for view, part in zip(views, source.parts, strict=True):
            view.copy_(part)
        got = ops.tiles_linear(x, *views, bias, *case.fields, "fused")
        assert_same_bits(got, source.linear(x, bias.contiguous(), "fused"))


def test_workspaces_grow_and_stay_zero():
    fused._local.workspaces.clear()
    small, large = tiles(gaussian((ROWS, COLS))), tiles(gaussian((300, COLS)))
    for case in (small, large, small):
        case.linear(x_of((3, COLS)), None, "fused")
    (memory,) = fused._local.workspaces.values()
    assert not memory[:ARRIVED_BYTES].any()
    np.testing.assert_array_equal(
        words(large.linear(x_of((3, COLS)), None, "fused")), expected(x_of((3, COLS)), large.weight, None)
    )


def test_a_capture_needs_a_run_before(monkeypatch):
    """With a capture in name only."""
    case, x = tiles(gaussian((ROWS, COLS), seed=13)), x_of((2, COLS))
    bias = gaussian((ROWS,), seed=3)
    outside = case.linear(x, None, "fused")
    place = runtime.current_place(torch.device("cpu"))
    for capture in (1, 1, 2):
        captured = runtime.Place(place.device, place.stream, capture)
        monkeypatch.setattr(runtime, "current_place", lambda device, captured=captured: captured)
        assert_same_bits(case.linear(x, None, "fused"), outside)
        ((number, _),) = fused._local.captured.values()
        assert number == capture
        with pytest.raises(UsageError, match="run the model once, then capture"):
            case.linear(x, bias, "fused")
        assert not fused.prepare([fused.Matrix(case.parts, ROWS, bias)], COLS, ())
    fused._local.captured.clear()


def test_nothing_is_kept_in_memory_of_inductor_s_graphs(monkeypatch):
    monkeypatch.setattr(queues, "in_graph_tree", lambda device: True)
    fused._local.workspaces.clear()
    case, x = tiles(gaussian((ROWS, COLS), seed=14)), x_of((2, COLS))
    np.testing.assert_array_equal(words(case.linear(x, None, "fused")), expected(x, case.weight, None))
    assert not fused._local.workspaces
    with pytest.raises(UsageError, match="expected a bias"):
        case.linear(x, gaussian((ROWS,), torch.float64), "fused")


def test_what_was_decoded_ahead_in_vain_is_freed():
    first, second = (tiles(gaussian((COLS, COLS), seed=seed)) for seed in range(2))
    many, few = x_of((65, COLS)), x_of((2, COLS))
    for _ in range(2):
        second.linear(first.linear(many, None, "fused"), None, "fused")
    first.linear(many, None, "fused")
    (prefetcher,) = (prefetcher for _, prefetcher in runtime._local.prefetchers.values())
    assert prefetcher._ahead
    second.linear(few, None, "fused")
    assert not prefetcher._ahead
    first.linear(many, None, "fused")
    assert not prefetcher._ahead
    second.linear(first.linear(many, None, "fused"), None, "fused")
    first.linear(many, None, "fused")
    assert prefetcher._ahead


def test_other_devices_have_other_orders():
    case, x = tiles(gaussian((ROWS, 4096))), x_of((2, 4096))
    launcher = EmulatedLauncher(0)
    found = []
    for multiprocessors in (1, 132):
        properties = launcher.properties.__class__(**{**vars(launcher.properties), "multiprocessors": multiprocessors})
        other = EmulatedLauncher(0)
        other.properties = properties
        with ops.gpu.emulate(EmulatedQueue(other)):
            found.append(case.linear(x, None, "fused"))
            order = fused.order_of((ROWS,), 4096, properties)
            np.testing.assert_array_equal(words(found[-1]), reference.linear(words(x), words(case.weight), order))
