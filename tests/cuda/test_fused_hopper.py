"""The kernel for sm_90a: in the emulation, the bits of the reference on whatever its parts and shapes are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fused_cases import DeviceGroup, activations, bf16, cancelling, floats, on_hopper

from bitforbit.cuda import compiler, sources
from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused import reference
from bitforbit.cuda.fused.order import Order, choose_order
from bitforbit.cuda.fused.plan import HOPPER, Hopper
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles import naive
from bitforbit.cuda.tiles.layout import PARTS
from bitforbit.errors import UsageError
from cuda_shim.emulation import HOPPER as HOPPER_GPU
from cuda_shim.emulation import EmulatedQueue, run_all_seeds, run_everywhere
from cuda_shim.emulation import queue as emulated_queue
from helpers.tile_cases import Words, cases, gaussian, with_exponents

CASES = cases()
TRAINED = [*range(118, 126)] * 12 + [3, 117, 130]
FEW, MANY = HOPPER[0], HOPPER[-1]
WARPGROUPS = Hopper.instruction
ids = pytest.mark.parametrize("variant", HOPPER, ids=lambda v: f"{v.tokens}-{v.warps}")


def close(got: Words, x: Words, words: Words, bias: Words | None = None) -> None:
    """As far from FP64 as rounding allows: how the hardware sums is its own business."""
    exact, size = floats(x) @ floats(words).T, np.abs(floats(x)) @ np.abs(floats(words)).T
    if bias is not None:
        exact, size = exact + floats(bias), size + np.abs(floats(bias))
    assert (np.abs(floats(got) - exact) <= np.abs(exact) * 2**-8 + size * 2**-16).all()


def group_of(queue: Any, matrices: list[Words], splits: int | None = None, **more: Any) -> DeviceGroup:
    """Matrices whose products are to be summed by the kernel's instruction."""
    group = DeviceGroup(queue, matrices, **more)
    order = group.group.order if splits is None else Order(matrices[0].shape[1], splits)
    group.use(replace(order, instruction=WARPGROUPS))
    return group


def check(queue: Any, words: Words, x: Words, variant: Hopper, splits: int | None = None, offset: int = 0) -> None:
    group = group_of(queue, [words], splits)
    (got,) = group.linear(x, variant, offset=offset)
    if isinstance(queue, EmulatedQueue):
        np.testing.assert_array_equal(got, reference.linear(x, words, group.order))
    else:
        close(got, x, words)


@pytest.fixture
def queue(queue: Any) -> Any:
    """One that the kernel runs on."""
    return on_hopper(queue)


@pytest.mark.parametrize("name", CASES)
def test_hostile_matrices(queue: Any, name: str) -> None:
    """Weights with huge exponents, infinities and NaNs: on a GPU, which values are NaN, and the others' zeros."""
    words = CASES[name]
    x = activations(3, words.shape[1])
    group = group_of(queue, [words])
    (got,) = group.linear(x, FEW)
    if isinstance(queue, EmulatedQueue):
        np.testing.assert_array_equal(got, reference.linear(x, words, group.order))
    else:
        assert got.shape == (3, len(words))


@ids
@pytest.mark.parametrize(("rows", "cols", "splits"), [(1, 1, 1), (129, 1096, 1), (300, 1000, 4)])
def test_variants(queue: Any, variant: Hopper, rows: int, cols: int, splits: int) -> None:
    """All of their tokens and fewer, ranges of columns that are no multiple of a chunk, rows that fill no block."""
    words = with_exponents(rows, cols, TRAINED, rows)
    for tokens in (variant.tokens, variant.tokens - 3):
        check(queue, words, activations(tokens, cols), variant, splits)


@ids
@pytest.mark.parametrize("splits", [1, 3])
def test_sums_that_are_exact_in_any_order(queue: Any, variant: Hopper, splits: int) -> None:
    """Small whole numbers: a GPU gives the reference's bits, too, however it sums."""
    random = np.random.default_rng(12)
    words, x = bf16(random.integers(-120, 121, (141, 1160))), bf16(random.integers(-50, 51, (variant.tokens - 1, 1160)))
    (got,) = group_of(queue, [words], splits).linear(x, variant)
    np.testing.assert_array_equal(got, reference.linear(x, words, Order(1160, splits)))


@pytest.mark.parametrize(("cols", "offset"), [(331, 0), (332, 0), (328, 2), (65, 14), (63, 0)])
def test_any_number_of_columns_at_any_address(queue: Any, cols: int, offset: int) -> None:
    check(queue, with_exponents(33, cols, TRAINED), activations(7, cols), FEW, offset=offset)


def test_a_token_has_the_same_bits_in_any_company(queue: Any) -> None:
    words, x = gaussian(144, 1000, 1), activations(64, 1000)
    group = group_of(queue, [words], 3)
    (whole,) = group.linear(x, MANY)
    for begin, end in [(0, 1), (63, 64), (5, 13), (20, 50)]:
        np.testing.assert_array_equal(group.linear(x[begin:end], MANY)[0], whole[begin:end])
    for variant in HOPPER:
        np.testing.assert_array_equal(group.linear(x[: variant.tokens], variant)[0], whole[: variant.tokens])


def test_groups(queue: Any) -> None:
    """Matrices of different sizes, with a bias and without, in one launch."""
    matrices = [gaussian(rows, 600, rows) for rows in (200, 17, 128, 1)]
    biases = [bf16(np.random.default_rng(0).standard_normal(200)), None, bf16(np.full(128, -0.0)), bf16([3.0])]
    group = group_of(queue, matrices, biases=biases)
    for variant in (FEW, MANY):
        x = activations(variant.tokens - 1, 600)
        for got, words, bias in zip(group.linear(x, variant), matrices, biases, strict=True):
            if isinstance(queue, EmulatedQueue):
                np.testing.assert_array_equal(got, reference.linear(x, words, group.order, bias))
            else:
                close(got, x, words, bias)


@pytest.mark.parametrize("where", ["x", "weights", "both"])
def test_nan_and_infinity(queue: Any, where: str) -> None:
    words, x = gaussian(40, 200, 3), activations(5, 200)
    if where != "x":
        words[3, 7], words[4, 9], words[5, 199] = 0x7F81, 0x7F80, 0xFF80
    if where != "weights":
        x[1, 3], x[2, 8], x[3, 0] = 0xFFC0, 0xFF80, 0x7F80
    (got,) = group_of(queue, [words]).linear(x, FEW)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(np.isnan(floats(got)), np.isnan(floats(x) @ floats(words).T))


@pytest.mark.parametrize("share", [0.06, 0.3, 1])
@pytest.mark.parametrize("exponents", [60, 200])
def test_long_lists_of_escapes(queue: Any, share: float, exponents: int) -> None:
    """More than a lane each, more than a chunk has room for, all weights; in both widths of entries."""
    words = gaussian(48, 520, 7)
    random = np.random.default_rng(8)
    outside = random.random(words.shape) < share
    drawn = random.integers(0, exponents, words.shape).astype(np.uint16)
    words = np.where(outside, words & 0x807F | drawn << 7, words).astype(np.uint16)
    if exponents == 200:
        words[drawn > 130] &= 0x807F  # no infinite sums
    check(queue, words, bf16(np.random.default_rng(9).standard_normal((4, 520)) * 2.0**-40), FEW)


@pytest.mark.parametrize("variant", [FEW, MANY], ids=["8", "64"])
@pytest.mark.parametrize("cols", [720, 331])
def test_memory_and_races(variant: Hopper, cols: int) -> None:
    words, x = with_exponents(145, cols, TRAINED, 6), activations(variant.tokens - 1, cols)

    def run(queue: Any) -> list[Words]:
        return group_of(queue, [words, words[:20]], 2).linear(x, variant)

    whole, part = run_everywhere(run)
    np.testing.assert_array_equal(whole, reference.linear(x, words, Order(cols, 2)))
    np.testing.assert_array_equal(part, whole[:, :20])


@pytest.mark.parametrize("part", PARTS)
def test_damaged_parts_do_no_harm(part: str) -> None:
    words = with_exponents(33, 300, TRAINED, 1)
    random = np.random.default_rng(0)
    for wide_entries in (False, True):
        parts = naive.pack(words)
        parts[part] = random.integers(0, 256, parts[part].size, np.uint8)
        if wide_entries:
            parts["header"] = parts["header"].copy()
            parts["header"][68:72].view("<u4")[0] = 4
        group = group_of(emulated_queue("memory"), [words], 2, parts=[parts])
        assert group.linear(activations(3, 300), FEW)[0].shape == (3, 33)


@pytest.mark.parametrize("lie", [[0, 0xFFFFFFFF], [0xFFFFFFFF, 0], [7, 7], [0xFFFFFF00, 0xFFFFFFF0], [3, 2]])
def test_offsets_that_lie(lie: list[int]) -> None:
    words = gaussian(16, 64, 2)
    parts = naive.pack(words)
    parts["offsets"] = np.array([*lie, 0, 0], "<u4").view(np.uint8)
    group = group_of(emulated_queue("memory"), [words], parts=[parts])
    assert group.linear(activations(3, 64), FEW)[0].shape == (3, 16)


@ids
def test_the_compiler_keeps_products_asynchronous(variant: Hopper) -> None:
    """No warning C75xx, which says that it waits for each; no spills."""
    pytest.importorskip("cuda.bindings.nvrtc")
    kernel = variant.kernel()
    text = sources.text(kernel.source)
    _, log = compiler.compile_with_log(text, "sm_90a", kernel.defines, ["--ptxas-options=-v"], kernel.source)
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    assert "serialized" not in log
    assert "C75" not in log


@ids
def test_blocks_find_room(variant: Hopper) -> None:
    """As many as the variant says, in the 228 KiB of shared memory of an H100's or H200's multiprocessor."""
    assert variant.blocks * (variant.shared_bytes() + 1024) <= 228 << 10
    assert variant.warps % 8 == 0
    assert variant.unit_rows == 16 * variant.warps


def test_only_its_architecture() -> None:
    ada = DeviceProperties("Ada", (8, 9), 128, 72 << 20, 99 << 10)
    order = replace(choose_order((256,), 512, ada), instruction=WARPGROUPS)
    with pytest.raises(UsageError, match=r"compute capability 9\.0 for Hopper"):
        plans.plan((256,), order, 8, ada, FEW)
    with pytest.raises(UsageError, match="expected an instruction of Ada for BF16, got wgmma"):
        plans.plan((256,), order, 8, ada)


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 0), (8, 0), (9, 1), (32, 3), (33, 4), (64, 4)])
def test_an_order_that_names_the_instruction_gets_the_kernel(tokens: int, chosen: int) -> None:
    order = Order(512, 2, instruction=WARPGROUPS)
    assert plans.plan((256,), order, tokens, HOPPER_GPU).variant == HOPPER[chosen]


@pytest.mark.parametrize(
    "order",
    [
        Order(700, 4, split_tiles=2, longer=3, instruction=WARPGROUPS),
        Order(700, 5, reduction="halves", partials="BF16", bias_rounded=True, instruction=WARPGROUPS),
        Order(700, 6, reduction="neighbours", partials="running BF16", instruction=WARPGROUPS),
        Order(700, 3, reduction="descending", instruction=WARPGROUPS),
    ],
    ids=lambda order: order.reduction,
)
def test_orders(order: Order) -> None:
    words, x = cancelling(70, 700, 11)
    bias = bf16(np.random.default_rng(0).standard_normal(70))

    def run(queue: Any) -> Words:
        group = DeviceGroup(queue, [words], [bias])
        group.use(order)
        return group.linear(x)[0]

    np.testing.assert_array_equal(run_all_seeds(run), reference.linear(x, words, order, bias))
