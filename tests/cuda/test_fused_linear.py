"""Products straight from tiles have the bits of the reference, whatever the variant, other tokens, the lanes' order.

On a GPU, whose matrix instruction sums in a way of its own, they have the bits of a kernel that reads plain weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fused_cases import DeviceGroup, activations, bf16, cancelling, floats, plain

from bitforbit.cuda.fused import linear, reference
from bitforbit.cuda.fused.order import Order, choose_order
from bitforbit.cuda.fused.plan import BULK, VARIANTS, Variant
from bitforbit.cuda.tiles import naive
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from bitforbit.errors import CorruptTensorError, UsageError
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue, run_everywhere
from cuda_shim.emulation import queue as emulated_queue
from helpers.tile_cases import Words, cases, gaussian, with_exponents

CASES = cases()
ALL = VARIANTS + BULK
TRAINED = [*range(118, 126)] * 12 + [3, 117, 130]
ids = pytest.mark.parametrize("variant", ALL, ids=lambda v: f"{v.tokens}-{v.stripes}{'-bulk' if v.bulk else ''}")


def expected(queue: Any, x: Words, words: Words, order: Order, bias: Words | None = None) -> Words:
    """By the reference in the emulation, by the plain kernel on a GPU."""
    if isinstance(queue, EmulatedQueue):
        return reference.linear(x, words, order, bias)
    return plain(queue, words, x, order, bias)


def check(
    queue: Any, words: Words, x: Words, variant: Variant | None = None, splits: int | None = None, offset: int = 0
) -> None:
    device = DeviceGroup(queue, [words], splits=splits)
    (got,) = device.linear(x, variant, offset=offset)
    np.testing.assert_array_equal(got, expected(queue, x, words, device.group.order))


@pytest.mark.parametrize("name", CASES)
def test_hostile_matrices(queue: Any, name: str) -> None:
    words = CASES[name]
    check(queue, words, activations(3, words.shape[1]))


@ids
@pytest.mark.parametrize(("rows", "cols", "splits"), [(16, 64, 1), (1, 1, 1), (129, 1096, 1), (300, 1000, 4)])
def test_variants(queue: Any, variant: Variant, rows: int, cols: int, splits: int) -> None:
    """All of their tokens and fewer, ranges of columns that are no multiple of a chunk, rows that fill no block."""
    words = with_exponents(rows, cols, TRAINED, rows)
    for tokens in (variant.tokens, variant.tokens - 3):
        check(queue, words, activations(tokens, cols), variant, splits)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 17, 31, 33, 64])
def test_tokens(queue: Any, tokens: int) -> None:
    check(queue, with_exponents(40, 200, TRAINED), activations(tokens, 200))


@pytest.mark.parametrize(("cols", "offset"), [(331, 0), (332, 0), (328, 2), (65, 14), (63, 0)])
def test_any_number_of_columns_at_any_address(queue: Any, cols: int, offset: int) -> None:
    check(queue, with_exponents(33, cols, TRAINED), activations(9, cols), offset=offset)


def test_a_token_has_the_same_bits_in_any_company(queue: Any) -> None:
    words, x = gaussian(144, 1000, 1), activations(64, 1000)
    device = DeviceGroup(queue, [words])
    assert device.group.order.splits > 1
    (whole,) = device.linear(x)
    for begin, end in [(0, 1), (63, 64), (5, 13), (20, 50)]:
        np.testing.assert_array_equal(device.linear(x[begin:end])[0], whole[begin:end])
    for variant in ALL:
        np.testing.assert_array_equal(device.linear(x[: variant.tokens], variant)[0], whole[: variant.tokens])


def test_groups(queue: Any) -> None:
    """Matrices of different sizes, with a bias and without, in one launch."""
    matrices = [gaussian(rows, 600, rows) for rows in (200, 17, 128, 1)]
    biases = [bf16(np.random.default_rng(0).standard_normal(200)), None, bf16(np.full(128, -0.0)), bf16([3.0])]
    device = DeviceGroup(queue, matrices, biases)
    assert device.group.order == choose_order((200, 17, 128, 1), 600, queue.properties)
    for tokens in (1, 20):
        x = activations(tokens, 600, tokens)
        for got, words, bias in zip(device.linear(x), matrices, biases, strict=True):
            np.testing.assert_array_equal(got, expected(queue, x, words, device.group.order, bias))


@pytest.mark.parametrize("where", ["x", "weights", "both"])
def test_nan_and_infinity(queue: Any, where: str) -> None:
    words, x = gaussian(40, 200, 3), activations(5, 200)
    if where != "x":
        words[3, 7], words[4, 9], words[5, 199] = 0x7F81, 0x7F80, 0xFF80
    if where != "weights":
        x[1, 3], x[2, 8], x[3, 0] = 0xFFC0, 0xFF80, 0x7F80
    (got,) = DeviceGroup(queue, [words]).linear(x)
    np.testing.assert_array_equal(got, expected(queue, x, words, choose_order((40,), 200, queue.properties)))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(np.isnan(floats(got)), np.isnan(floats(x) @ floats(words).T))


def test_close_to_fp64(queue: Any) -> None:
    words, x = gaussian(64, 2048, 4), activations(8, 2048)
    got = floats(DeviceGroup(queue, [words]).linear(x)[0])
    exact, size = floats(x) @ floats(words).T, np.abs(floats(x)) @ np.abs(floats(words)).T
    assert (np.abs(got - exact) <= np.abs(exact) * 2**-8 + size * 2**-17).all()


def test_the_plain_kernel_is_the_reference() -> None:
    words, x, order = gaussian(33, 331, 5), activations(11, 331), Order(331, 3)
    bias = bf16(np.random.default_rng(0).standard_normal(33))
    got = run_everywhere(lambda queue: plain(queue, words, x, order, bias))
    np.testing.assert_array_equal(got, reference.linear(x, words, order, bias))


@ids
def test_the_order_shows_in_nearly_all_bits(queue: Any, variant: Variant) -> None:
    words, x = cancelling(150, 1200, variant.tokens)
    device = DeviceGroup(queue, [words], splits=3)
    (got,) = device.linear(x, variant)
    np.testing.assert_array_equal(got, expected(queue, x, words, device.group.order))
    (other,) = DeviceGroup(queue, [words], splits=4).linear(x, variant)
    assert (got != other).mean() > 0.5


@ids
def test_the_order_is_that_of_the_plain_kernel_however_an_instruction_sums(variant: Variant) -> None:
    """Here one that rounds after each product, so that the order within it shows, too."""
    words, x = cancelling(40, 600, variant.tokens)
    queue = EmulatedQueue(EmulatedLauncher(mma_rounds_each=True))
    device = DeviceGroup(queue, [words], splits=3)
    (got,) = device.linear(x, variant)
    np.testing.assert_array_equal(got, plain(queue, words, x, device.group.order))
    assert (got != reference.linear(x, words, device.group.order)).mean() > 0.5


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1], *BULK], ids=["8", "64", "8-bulk", "64-bulk"])
@pytest.mark.parametrize("cols", [720, 331])
def test_memory_and_races(variant: Variant, cols: int) -> None:
    words, x = with_exponents(145, cols, TRAINED, 6), activations(variant.tokens - 1, cols)

    def run(queue: Any) -> list[Words]:
        return DeviceGroup(queue, [words, words[:20]], splits=2).linear(x, variant)

    whole, part = run_everywhere(run)
    np.testing.assert_array_equal(whole, reference.linear(x, words, Order(cols, 2)))
    np.testing.assert_array_equal(part, whole[:, :20])


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
    check(queue, words, bf16(np.random.default_rng(9).standard_normal((4, 520)) * 2.0**-40))


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
        device = DeviceGroup(emulated_queue("memory"), [words], parts=[parts], splits=2)
        assert device.linear(activations(3, 300))[0].shape == (3, 33)


@pytest.mark.parametrize("lie", [[0, 0xFFFFFFFF], [0xFFFFFFFF, 0], [7, 7], [0xFFFFFF00, 0xFFFFFFF0], [3, 2]])
def test_offsets_that_lie(lie: list[int]) -> None:
    words = gaussian(16, 64, 2)
    parts = naive.pack(words)
    parts["offsets"] = np.array([*lie, 0, 0], "<u4").view(np.uint8)
    device = DeviceGroup(emulated_queue("memory"), [words], parts=[parts])
    assert device.linear(activations(3, 64))[0].shape == (3, 16)


def test_nothing_is_launched_for_nothing() -> None:
    queue = EmulatedQueue()
    assert DeviceGroup(queue, [gaussian(20, 60)]).linear(np.zeros((0, 60), np.uint16))[0].shape == (0, 20)
    assert not queue.launcher.launches


def test_arguments_that_are_refused() -> None:
    queue = EmulatedQueue()
    layout = TileLayout(20, 60)
    parts = [(256, layout.tiles_bytes), (256, 16), (256, layout.offsets_bytes), (256, 128)]
    with pytest.raises(UsageError, match="one number of columns and one kind, got"):
        linear.prepare(queue, [])
    with pytest.raises(UsageError, match="one number of columns and one kind, got"):
        linear.prepare(queue, [(parts, layout, 0), (parts, TileLayout(20, 61), 0)])
    with pytest.raises(CorruptTensorError, match="got"):
        linear.prepare(queue, [([(256, 1), *parts[1:]], layout, 0)])
    with pytest.raises(UsageError, match="on its elements' size, BF16"):
        linear.prepare(queue, [(parts, layout, 3)])
    with pytest.raises(UsageError, match="1 to 1 splits"):
        linear.prepare(queue, [(parts, layout, 0)], 2)
    group = linear.prepare(queue, [(parts, layout, 0)])
    for x, out, workspace in [(1, 0, 0), (0, 1, 0), (0, 0, 8)]:
        with pytest.raises(UsageError, match="even addresses"):
            linear.linear(queue, group, x, 1, out, workspace)
    with pytest.raises(UsageError, match="1 to 64 tokens, got 65"):
        linear.linear(queue, group, 0, 65, 0, 0)
    assert not queue.launcher.launches


@pytest.mark.parametrize("seed", range(16))
def test_any_shape(queue: Any, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows, cols = int(random.integers(1, 400)), int(random.integers(1, 900))
    variant = ALL[int(random.integers(len(ALL)))]
    tokens = int(random.integers(1, variant.tokens + 1))
    splits = int(random.integers(1, min(6, -(-cols // 64)) + 1))
    exponents = [*range(118, 126)] * int(random.integers(1, 40)) + random.integers(90, 140, 4).tolist()
    words = with_exponents(rows, cols, exponents, seed)
    check(queue, words, activations(tokens, cols, seed), variant, splits, 2 * int(random.integers(2)))
