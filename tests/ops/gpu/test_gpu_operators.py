"""The operators on GPU layouts, their kernels emulated, against torch on the decoded weight: bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.errors import BitforbitError, CorruptTensorError, UsageError
from bitforbit.ops import direct, stats
from bitforbit.ops.gpu import planes, runtime
from helpers.gpu_weights import LAYOUTS, OPERATORS
from torch_helpers import KINDS, assert_same_bits, encode, gaussian, random_bits

ROWS, COLS = 40, 200

pytestmark = pytest.mark.usefixtures("emulated")


def x_of(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(cols: int = COLS) -> dict[str, torch.Tensor]:
    return {
        "1d": x_of((cols,)),
        "2d": x_of((5, cols)),
        "3d": x_of((2, 3, cols)),
        "3d swapped": x_of((3, 2, cols)).transpose(0, 1),
        "by columns": x_of((cols, 5)).t(),
        "no tokens": x_of((0, cols)),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(inputs()))
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_has_the_bits_of_torch(layout, name, with_bias):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    bias = gaussian((ROWS,), seed=3) if with_bias else None
    x = inputs()[name]
    expected = functional.linear(x, case.weight, bias)
    for mode in ops.MODES if layout != "tiles" else ("exact",):
        assert_same_bits(case.linear(x, bias, mode), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(100, 300), (17, 1001), (70, 64)])
def test_decode(layout, shape):
    rows = shape[0]
    case = LAYOUTS[layout](gaussian(shape))
    for begin, end in ((0, rows), (0, 0), (3, 17), (rows - 1, rows)):
        assert_same_bits(case.decode(begin, end), case.weight[begin:end])


def test_decode_gives_every_bit():
    weight = gaussian((64, 200))
    weight[::4] = random_bits((16, 200), torch.bfloat16)
    for layout in ("tiles", "planes"):
        assert_same_bits(LAYOUTS[layout](weight).decode(0, 64), weight)


@pytest.mark.parametrize("dtype", KINDS)
def test_planes_of_every_kind(dtype):
    weight = random_bits((40, 72), dtype)
    parts, how = encode(weight)
    assert_same_bits(planes.decode(*parts, *how, 5, 40), weight[5:])
    ids = torch.tensor([[39, 0], [7, 7]])
    assert_same_bits(planes.embedding(ids, *parts, *how), weight.view(torch.uint8).view(40, -1)[ids].view(dtype))


def test_planes_of_widened_bf16():
    weight = gaussian((40, 96)).float()
    parts, how = encode(weight, "BF16")
    x = x_of((3, 96), torch.float32)
    assert_same_bits(planes.decode(*parts, *how, 7, 31), weight[7:31])
    assert_same_bits(planes.linear(x, *parts, None, *how, "exact"), functional.linear(x, weight))


IDS = [
    torch.tensor(7),
    torch.tensor([[0, 0, 15, 16], [31, 32, 39, 1]]),
    torch.zeros(2, 0, dtype=torch.int64),
    torch.tensor([5, 5, 30], dtype=torch.int32),
    torch.arange(40).reshape(5, 8).t(),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ids", IDS, ids=lambda ids: "x".join(map(str, ids.shape)) or "scalar")
def test_embedding(layout, ids):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    assert_same_bits(case.embedding(ids), case.weight[ids.long()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ids", [[-1], [ROWS], [3, 1 << 40]])
def test_embedding_refuses_ids_as_torch_does(layout, ids):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    with pytest.raises(IndexError, match="index out of range"):
        case.embedding(torch.tensor(ids))
    assert_same_bits(case.embedding(torch.tensor([1])), case.weight[[1]])  # said once


@pytest.mark.parametrize("layout", OPERATORS)
@pytest.mark.parametrize("name", ["1d", "3d", "3d swapped", "by columns"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_have_the_bits_of_torch(layout, name, with_bias):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    results = []
    for ours in (True, False):
        x = inputs()[name].requires_grad_()
        bias = gaussian((ROWS,), seed=3).requires_grad_() if with_bias else None
        y = case.linear(x, bias) if ours else functional.linear(x, case.weight, bias)
        results.append([y, *torch.autograd.grad(y, [t for t in (x, bias) if t is not None], x_of(tuple(y.shape)))])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("layout", OPERATORS)
def test_no_decoded_weight_is_saved(layout):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = case.linear(x_of((5, COLS)).requires_grad_())
    assert {t.data_ptr() for t in saved} <= {part.data_ptr() for part in case.parts}
    y.sum().backward()


@pytest.mark.parametrize("layout", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(layout, dtype):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    bias = gaussian((ROWS,), torch.float32)
    x = x_of((5, COLS), torch.float32)
    with torch.autocast("cpu", dtype):
        assert_same_bits(case.linear(x, bias), functional.linear(x, case.weight, bias))


@pytest.mark.parametrize("layout", OPERATORS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(layout, with_bias):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    bias = gaussian((ROWS,)).requires_grad_() if with_bias else None
    x = x_of((2, 3, COLS)).requires_grad_()
    torch.library.opcheck(case.linear_op, (x, *case.parts, bias, *case.fields, "exact"))
    if not with_bias:
        torch.library.opcheck(case.embedding_op, (torch.tensor([[1, 2]]), *case.parts, *case.fields))


def test_opcheck_of_decoding():
    case = LAYOUTS["tiles"](gaussian((ROWS, COLS)))
    torch.library.opcheck(ops.tiles_decode, (*case.parts, *case.fields, 3, 9))
    case = LAYOUTS["df11"](gaussian((ROWS, COLS)))
    torch.library.opcheck(ops.df11_decode, (*case.parts, case.fields[0], 3, 900))


@pytest.mark.parametrize("layout", OPERATORS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_breaks(layout, backend):
    case = LAYOUTS[layout](gaussian((COLS, COLS)))

    def step(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return case.linear((case.embedding(ids) + case.linear(x)).relu())

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    for tokens in (3, 5) if backend == "aot_eager" else (3,):
        ids = torch.arange(tokens)
        ours, theirs = (x_of((tokens, COLS)).requires_grad_() for _ in range(2))
        got, expected = compiled(ours, ids), step(theirs, ids)
        assert_same_bits(got, expected)
        got.sum().backward()
        expected.sum().backward()
        assert_same_bits(ours.grad, theirs.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_that_decode_ahead(layout, emulated):
    """The second pass takes what was decoded ahead: every weight is decoded once per pass, with the same results."""
    cases = [LAYOUTS[layout](gaussian((COLS, COLS), seed=seed)) for seed in range(3)]
    x = x_of((2, COLS))

    def forward() -> torch.Tensor:
        return cases[2].linear(cases[1].linear(cases[0].linear(x)))

    expected = x
    for case in cases:
        expected = functional.linear(expected, case.weight)
    assert_same_bits(forward(), expected)
    first = len(emulated.launches)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        emulated.launches.clear()
        with context():
            assert_same_bits(forward(), expected)
        assert len(emulated.launches) <= first
    y = cases[1].linear(cases[0].linear(x_of((2, COLS)).requires_grad_()))
    if layout in OPERATORS:
        y.sum().backward()


@pytest.mark.parametrize("layout", OPERATORS)
@pytest.mark.parametrize("call", ["plain", "gradients", "inference", "compiled"])
def test_weights_are_decoded_ahead_however_they_are_used(layout, call):
    first, second = (LAYOUTS[layout](gaussian((COLS, COLS), seed=seed)) for seed in range(2))
    x = x_of((2, COLS))
    if call == "gradients":
        x.requires_grad_()
    forward = torch.compile(first.linear, fullgraph=True, backend="aot_eager") if call == "compiled" else first.linear
    with torch.inference_mode(call == "inference"):
        second.linear(forward(x))
        h = forward(x)
        (prefetcher,) = (prefetcher for _, prefetcher in runtime._local.prefetchers.values())
        (ahead,) = prefetcher._ahead.values()
        assert ahead.weight.parts[0] is second.parts[0]
        assert_same_bits(second.linear(h), functional.linear(h, second.weight))
        assert not prefetcher._ahead


def test_changes_in_place_are_seen():
    one, other = (LAYOUTS["tiles"](weight) for weight in (gaussian((ROWS, COLS)), -gaussian((ROWS, COLS))))
    first = LAYOUTS["tiles"](gaussian((COLS, COLS), seed=7))
    x = x_of((2, COLS))
    for _ in range(2):
        one.linear(first.linear(x))
    h = first.linear(x)  # decodes `one` ahead
    for mine, theirs in zip(one.parts, other.parts, strict=True):
        mine.copy_(theirs)
    assert_same_bits(one.linear(h), functional.linear(h, other.weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refusals(layout):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    x = x_of((5, COLS))
    with pytest.raises(UsageError, match="a mode among exact, fused, got 'quick'"):
        case.linear(x, mode="quick")
    with pytest.raises(UsageError, match=r"shape \[..., 200\] on cpu, got torch.bfloat16 and \(5, 199\)"):
        case.linear(x[:, 1:])
    with pytest.raises(UsageError, match=r"expected x of dtype torch\.bfloat16"):
        case.linear(x.float())
    with pytest.raises(UsageError, match="expected ids of dtype"):
        case.embedding(torch.tensor([1.0]))
    parts = case.parts
    for wrong in (parts[0].int(), parts[0].repeat(2)[::2], parts[0].view(1, -1)):
        case.parts = (wrong, *parts[1:])
        with pytest.raises(UsageError, match="to be contiguous uint8 of one dimension"):
            case.linear(x)
    for i in range(4):
        case.parts = (*parts[:i], parts[i][:-16].clone(), *parts[i + 1 :])
        if layout == "tiles" and i == 1:
            continue  # as many escapes as there are cannot be told from the length
        if layout == "planes" and i == 3:
            continue
        with pytest.raises(BitforbitError):
            case.linear(x)


def test_decode_refuses():
    case = LAYOUTS["tiles"](gaussian((ROWS, COLS)))
    with pytest.raises(UsageError, match="rows within 0 to 40, got 3 to 41"):
        case.decode(3, 41)
    with pytest.raises(CorruptTensorError, match="at least one row"):
        ops.tiles_decode(*case.parts, 0, COLS, 0, 0)
    case = LAYOUTS["df11"](gaussian((ROWS, COLS)))
    with pytest.raises(CorruptTensorError, match="within the"):
        ops.df11_linear(x_of((2, COLS)), *case.parts, None, case.fields[0], case.fields[0] - 5, ROWS, COLS, "exact")


def test_parts_on_any_boundary():
    for layout in LAYOUTS:
        case = LAYOUTS[layout](gaussian((ROWS, COLS)))
        case.parts = tuple(torch.cat([part[:3], part])[3:] for part in case.parts)
        x = x_of((2, COLS))
        assert_same_bits(case.linear(x), functional.linear(x, case.weight))


@pytest.mark.parametrize("layout", OPERATORS)
def test_direct_calls(layout):
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    linear, embedding = (getattr(direct, f"{layout}_{name}") for name in ("linear", "embedding"))
    x, ids = x_of((3, COLS)), torch.tensor([3, 9])
    assert_same_bits(linear(x, *case.parts, None, *case.fields, "exact"), case.linear(x))
    assert_same_bits(embedding(ids, *case.parts, *case.fields), case.embedding(ids))
    x.requires_grad_()
    assert linear(x, *case.parts, None, *case.fields, "exact").requires_grad


def test_stats():
    case = LAYOUTS["tiles"](gaussian((ROWS, COLS)))
    stats.reset()
    case.linear(x_of((2, COLS)))
    assert stats.snapshot()["decoded"] == stats.Count(1, 2 * ROWS * COLS)
    stats.reset()


def test_fakes():
    meta = [torch.empty(16, dtype=torch.uint8, device="meta") for _ in range(4)]
    x = torch.zeros(2, 3, COLS, dtype=torch.bfloat16, device="meta")
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    assert ops.tiles_linear(x, *meta, None, ROWS, COLS, "exact").shape == (2, 3, ROWS)
    assert ops.df11_linear(x, *meta, None, 99999, 5, ROWS, COLS, "exact").shape == (2, 3, ROWS)
    assert ops.tiles_embedding(ids, *meta, ROWS, COLS).shape == (2, 3, COLS)
    assert ops.df11_embedding(ids, *meta, 99999, 5, ROWS, COLS).shape == (2, 3, COLS)
    assert ops.tiles_decode(*meta, ROWS, COLS, 3, 9).shape == (6, COLS)
    assert ops.df11_decode(*meta, 99999, 3, 9).shape == (6,)
