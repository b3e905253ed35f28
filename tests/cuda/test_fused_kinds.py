"""Products straight from tiles of FP16 and FP8, and biases of any type: the bits of the reference.

On a GPU, whose matrix instruction sums in a way of its own, those of a kernel that reads plain weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fused_cases import DeviceGroup, on_hopper, plain

from bitforbit.cuda.fused import linear, plan, reference
from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.fused.plan import BULK, HALF_STEPS, HOPPER, VARIANTS, Variant
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles import naive
from bitforbit.cuda.tiles.kinds import BF16, F8_E4M3, F16, Elements, Kind, Words
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from bitforbit.errors import UsageError
from cuda_shim.emulation import EmulatedQueue, run_everywhere
from cuda_shim.emulation import queue as emulated_queue
from helpers.kind_cases import NEW, NUMBERS, cases, gaussian, with_exponents

CASES = {f"{kind.name} {name}": (kind, matrix) for kind in NEW for name, matrix in cases(kind).items()}
MMA = VARIANTS + BULK
of_kinds = pytest.mark.parametrize("kind", NEW, ids=lambda kind: kind.name)


def activations(kind: Kind, tokens: int, cols: int, seed: int = 0) -> Words:
    """As they come from a layer norm."""
    values = np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)
    return reference.to_words(values, kind.outputs)


def as_operand(kind: Kind, matrix: Elements) -> Words:
    """What the product multiplies by: FP8 becomes BF16."""
    return reference.bf16_of_f8(matrix) if kind == F8_E4M3 else matrix.view(np.uint16)


def expected(queue: Any, kind: Kind, x: Words, matrix: Elements, order: Order, bias: Any = None) -> Words:
    """By the reference in the emulation, by the plain kernel on a GPU."""
    operand = as_operand(kind, matrix)
    if isinstance(queue, EmulatedQueue) or order.instruction != Variant.instruction:
        return reference.linear(x, operand, order, bias, kind.outputs)
    return plain(queue, operand, x, order, bias, kind.outputs)


def check(
    queue: Any, kind: Kind, matrix: Elements, x: Words, variant: Variant | None = None, splits: int | None = None
) -> None:
    device = DeviceGroup(queue, [matrix], splits=splits, kind=kind)
    (got,) = device.linear(x, variant)
    np.testing.assert_array_equal(got, expected(queue, kind, x, matrix, device.group.order))


def test_fp8_as_bf16() -> None:
    elements = np.arange(256, dtype=np.uint8)
    values = (reference.bf16_of_f8(elements).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(values, elements.view(NUMBERS["F8_E4M3"]).astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_hostile_matrices(queue: Any, name: str) -> None:
    kind, matrix = CASES[name]
    check(queue, kind, matrix, activations(kind, 3, matrix.shape[1]))


@of_kinds
def test_every_pattern(queue: Any, kind: Kind) -> None:
    """Each weight times one is itself: eight tokens pick a column each; NaNs and infinities are in one of their own."""
    elements = np.arange(1 << 8 * kind.item_bytes, dtype=np.uint32).astype(f"u{kind.item_bytes}")
    finite = np.isfinite(elements.view(NUMBERS[kind.name]).astype(np.float32))
    whole = np.resize(elements[finite], (-(-int(finite.sum()) // 8), 8))
    for matrix in (whole, elements[~finite][:, None]):
        ones = reference.to_words(np.eye(matrix.shape[1], dtype=np.float32), kind.outputs)
        (got,) = DeviceGroup(queue, [matrix], kind=kind).linear(ones)
        words = as_operand(kind, matrix)
        if matrix is whole:
            want = np.where(words == 0x8000, 0, words)  # the sum begins with +0
        else:
            infinite = (words == 0x7C00) | (words == 0xFC00) if kind == F16 else np.zeros_like(words, bool)
            want = np.where(infinite, words, 0x7FFF)
        np.testing.assert_array_equal(got.T, want)


@of_kinds
@pytest.mark.parametrize("variant", MMA, ids=lambda v: f"{v.tokens}-{v.stripes}{'-bulk' if v.bulk else ''}")
@pytest.mark.parametrize(("rows", "cols", "splits"), [(129, 1096, 1), (70, 1000, 4)])
def test_variants(queue: Any, kind: Kind, variant: Variant, rows: int, cols: int, splits: int) -> None:
    matrix = with_exponents(kind, rows, cols, [*range(3, 11)] * 12 + [0, 1, 12], rows)
    check(queue, kind, matrix, activations(kind, variant.tokens - 1, cols), variant, splits)


@of_kinds
@pytest.mark.parametrize("variant", HOPPER, ids=lambda v: f"{v.tokens}-{v.warps}")
def test_warpgroups(queue: Any, kind: Kind, variant: Variant) -> None:
    """On a GPU whole numbers, of which all sums are exact in any order."""
    queue = on_hopper(queue)
    if not plan.has(variant, kind):
        pytest.skip("too large a block")
    rows, cols, tokens = 200, 1000, variant.tokens - 1
    random = np.random.default_rng(1)
    matrix = random.integers(-4, 5, (rows, cols)).astype(NUMBERS[kind.name]).view(f"u{kind.item_bytes}")
    x = reference.to_words(random.integers(-4, 5, (tokens, cols)).astype(np.float32), kind.outputs)
    if isinstance(queue, EmulatedQueue):
        matrix, x = cases(kind)["specials"], activations(kind, tokens, 256)
    device = DeviceGroup(queue, [matrix], kind=kind)
    order = Order(matrix.shape[1], 3, instruction=variant.instruction)
    device.use(order)
    np.testing.assert_array_equal(device.linear(x, variant)[0], expected(queue, kind, x, matrix, order))


@of_kinds
@pytest.mark.parametrize("variant", [VARIANTS[0], BULK[-1], HOPPER[0]], ids=["8", "64-bulk", "hopper"])
def test_memory_and_races(kind: Kind, variant: Variant) -> None:
    matrix, x = with_exponents(kind, 45, 331, [*range(3, 11)] * 6 + [0, 12], 6), activations(kind, 7, 331)
    order = Order(331, 2, instruction=variant.instruction)

    def run(queue: Any) -> list[Words]:
        device = DeviceGroup(queue, [matrix, matrix[:20]], kind=kind)
        device.use(order)
        return device.linear(x, variant)

    whole, part = run_everywhere(run)
    np.testing.assert_array_equal(whole, reference.linear(x, as_operand(kind, matrix), order, None, kind.outputs))
    np.testing.assert_array_equal(part, whole[:, :20])


@of_kinds
def test_long_lists_of_escapes(queue: Any, kind: Kind) -> None:
    check(queue, kind, cases(kind)["most-escape"], activations(kind, 9, 200))


@of_kinds
@pytest.mark.parametrize("part", PARTS)
def test_damaged_parts_do_no_harm(kind: Kind, part: str) -> None:
    matrix = cases(kind)["most-escape"]
    for wide_entries in (False, True):
        parts = naive.pack(matrix, kind)
        parts[part] = np.random.default_rng(0).integers(0, 256, parts[part].size, np.uint8)
        if wide_entries:
            parts["header"] = parts["header"].copy()
            parts["header"][68:72].view("<u4")[0] = 4
        device = DeviceGroup(emulated_queue("memory"), [matrix], parts=[parts], splits=2, kind=kind)
        assert device.linear(activations(kind, 3, 200))[0].shape == (3, len(matrix))


@pytest.mark.parametrize("kind", [BF16, *NEW], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rounded", [False, True])
def test_biases_of_any_type(queue: Any, kind: Kind, rounded: bool) -> None:
    """Of one launch: BF16, FP16, FP32, none."""
    rows, cols = 40, 200
    matrix = gaussian(F16, rows, cols) if kind == BF16 else gaussian(kind, rows, cols, 0, 4.0)
    values = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
    values[:2] = -0.0, np.inf
    biases = [reference.to_bf16(values), reference.to_f16(values), values, None]
    types = ["BF16", "F16", "F32", "BF16"]
    device = DeviceGroup(queue, [matrix] * 4, biases, kind=kind, bias_types=types)
    order = Order(cols, 2, bias_rounded=rounded)
    device.use(order)
    x = activations(kind, 5, cols)
    for got, bias, type_ in zip(device.linear(x), biases, types, strict=True):
        added = bias
        if bias is not None and type_ != "F32":
            added = reference._floats(bias, type_)
        if isinstance(queue, EmulatedQueue):
            want = reference.linear(x, as_operand(kind, matrix), order, added, kind.outputs)
        else:
            want = plain(queue, as_operand(kind, matrix), x, order, bias, kind.outputs, type_)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("outputs", ["BF16", "F16"])
def test_the_plain_kernel_is_the_reference(outputs: str) -> None:
    kind = F16 if outputs == "F16" else F8_E4M3
    words, x, order = as_operand(kind, gaussian(kind, 33, 331)), activations(kind, 11, 331), Order(331, 3)
    bias = np.random.default_rng(0).standard_normal(33).astype(np.float32)
    got = run_everywhere(lambda queue: plain(queue, words, x, order, bias, outputs, "F32"))
    np.testing.assert_array_equal(got, reference.linear(x, words, order, bias, outputs))


def test_launches_fit_the_devices() -> None:
    """All numbers of tokens, where shared memory is smallest and where it is largest; no half steps."""
    for capability, shared in [((8, 6), 99 << 10), ((9, 0), 227 << 10)]:
        device = DeviceProperties("D", capability, 100, 1 << 22, shared)
        for kind in NEW:
            for tokens in (1, 16, 32, 64):
                launch = plan.plan((4096,), Order(4096, 2), tokens, device, None, kind)
                assert launch.config.dynamic_shared == launch.variant.shared_bytes(kind) <= shared
                assert ("BITFORBIT_WEIGHTS", str(kind.number)) in launch.kernel.defines
            with pytest.raises(UsageError, match=f"expected an instruction of D for {kind.name}"):
                plan.plan((4096,), Order(4096, 2, instruction="mma.m16n8k8"), 1, device, None, kind)
            with pytest.raises(UsageError, match=f"expected a variant that there is for {kind.name}"):
                plan.plan((4096,), Order(4096, 2), 1, device, HALF_STEPS[0], kind)


def test_matrices_of_two_kinds_are_refused() -> None:
    layouts = [TileLayout(20, 60, F16), TileLayout(20, 60, F8_E4M3)]
    with pytest.raises(UsageError, match="one number of columns and one kind"):
        linear.prepare(EmulatedQueue(), [([(256, 0)] * 4, layout, 0) for layout in layouts])
