"""The families of oneDNN's orders, bit for bit against the numpy reference, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from bitforbit import cpu
from bitforbit.cpu import linear as native
from bitforbit.cpu import planes
from bitforbit.cpu.linear import Order
from bitforbit.errors import CorruptTensorError
from helpers.linear_reference import REFERENCES, from_bf16, same_floats, to_bf16

FAMILIES = ("vdpbf16", "vdpbf16_emulated", "tdpbf16", "lanes_pairwise")
KEEP_DENORMALS = ("vdpbf16_emulated", "lanes_pairwise")
CASES = [
    (family, isa)
    for isa, supported in cpu.implementations().items()
    if supported
    for family in FAMILIES
    if native._native.linear_implementation(family, isa, False) == isa
]


def in_blocks(family: str, k_block: int) -> Order:
    return Order(family, 0 if family == "lanes_pairwise" else k_block)


# Rows and columns: whole tiles (with the fast kernels' own path), edges of both, one of each, odd columns.
SHAPES = [(16, 64), (32, 128), (48, 320), (1, 1), (3, 2), (16, 33), (17, 64), (15, 65), (31, 127), (40, 200), (2, 700)]


def as_bytes(array: np.ndarray) -> planes.Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def random_bf16(shape: tuple[int, int], seed: int) -> np.ndarray:
    return to_bf16(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def any_bits(shape: tuple[int, int], seed: int, finite: bool) -> np.ndarray:
    words = np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16)
    return np.where(words >> 7 & 255 == 255, words & 0x807F, words).astype(np.uint16) if finite else words


def small_bits(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Products and sums around 2^-126, where denormals are flushed."""
    rng = np.random.default_rng(seed)
    exponent = rng.integers(60, 66, shape).astype(np.uint16)
    return (rng.integers(0, 128, shape) | rng.integers(0, 2, shape) << 15).astype(np.uint16) | exponent << 7


class Product:
    """One matrix, encoded and plain, on one instruction set."""

    def __init__(self, weight: np.ndarray, isa: str) -> None:
        self.weight, self.isa = weight, isa
        rows_per_table, self.parts = planes.encode(as_bytes(weight), "BF16", False, *weight.shape, 0, 1)
        self.geometry = (*weight.shape, rows_per_table)

    def __call__(self, x: np.ndarray, order: Order, threads: int = 1, dense: bool = False, bias=None) -> np.ndarray:
        out = np.full((len(x), len(self.weight)), 0x1234, np.uint16)
        rest = (as_bytes(x), "BF16", out.reshape(-1).view(np.uint8), bias if bias is None else as_bytes(bias), "BF16")
        with cpu.force(self.isa):
            if dense:
                native.linear_dense(as_bytes(self.weight), self.geometry[:2], *rest, order, threads)
            else:
                native.linear(self.parts, self.geometry, *rest, order, threads)
        return out


def expected(weight: np.ndarray, x: np.ndarray, order: Order) -> np.ndarray:
    with np.errstate(all="ignore"):
        sums = REFERENCES[order.family](weight, from_bf16(x), order.k_block)
    if order.family in KEEP_DENORMALS:
        return to_bf16(sums)
    tiny = np.abs(sums) < np.float32(2.0**-126)  # the conversion to BF16 flushes too
    return to_bf16(np.where(tiny, np.copysign(np.float32(0), sums), sums))


def check(weight: np.ndarray, x: np.ndarray, order: Order, isa: str) -> None:
    product, want = Product(weight, isa), expected(weight, x, order)
    for dense in (False, True):
        got = product(x, order, threads=1 + dense, dense=dense)
        assert same_floats(got, want), (weight.shape, len(x), order, isa, "dense" if dense else "encoded")


@pytest.mark.parametrize(("family", "isa"), CASES)
def test_random_numbers(family: str, isa: str) -> None:
    for i, shape in enumerate(SHAPES):
        for tokens in (1, 3, 7):
            check(random_bf16(shape, i), random_bf16((tokens, shape[1]), 100 + i), Order(family), isa)


@pytest.mark.parametrize(("family", "isa"), CASES)
@pytest.mark.parametrize("k_block", [2, 32, 34, 64, 96, 101, 128, 256, 1000])
def test_k_blocks(family: str, isa: str, k_block: int) -> None:
    """Blocks that end at a tile, inside one, inside a pair (then with the pair), and behind the last column."""
    for shape in ((16, 320), (20, 191)):
        for tokens in (1, 6):
            check(random_bf16(shape, 1), random_bf16((tokens, shape[1]), 2), in_blocks(family, k_block), isa)


@pytest.mark.parametrize(("family", "isa"), CASES)
def test_every_number_of_tokens(family: str, isa: str) -> None:
    """The same bits for a token alone as among others, and against the reference."""
    weight, x = random_bf16((16, 192), 3), random_bf16((35, 192), 4)
    order = in_blocks(family, 96)
    want = expected(weight, x, order)
    product = Product(weight, isa)
    for tokens in (*range(1, 19), 32, 35):
        assert same_floats(product(x[:tokens], order), want[:tokens]), tokens
        assert same_floats(product(x[:tokens], order, dense=True), want[:tokens]), tokens


@pytest.mark.parametrize(("family", "isa"), CASES)
@pytest.mark.parametrize("finite", [False, True])
def test_hostile_bits(family: str, isa: str, finite: bool) -> None:
    """Infinities, NaNs, denormals, signed zeros, sums that overflow."""
    for i, shape in enumerate([(16, 64), (16, 192), (33, 100), (1, 31)]):
        for tokens in (1, 5):
            x = any_bits((tokens, shape[1]), 50 + i, finite)
            check(any_bits(shape, i, finite), x, in_blocks(family, 64), isa)


@pytest.mark.parametrize(("family", "isa"), CASES)
def test_denormal_sums(family: str, isa: str) -> None:
    for k_block in (0, 32, 64):
        for i, shape in enumerate([(16, 128), (64, 192), (17, 90)]):
            check(small_bits(shape, i), small_bits((5, shape[1]), 9 + i), in_blocks(family, k_block), isa)


@pytest.mark.parametrize(("family", "isa"), CASES)
def test_threads_and_larger_matrices(family: str, isa: str) -> None:
    weight, x = random_bf16((208, 1152), 5), random_bf16((2, 1152), 6)
    want = expected(weight, x, in_blocks(family, 512))
    for threads in (1, 2, 5):
        assert same_floats(Product(weight, isa)(x, in_blocks(family, 512), threads), want)


@pytest.mark.parametrize(("family", "isa"), CASES)
def test_bias_is_added_before_the_rounding(family: str, isa: str) -> None:
    weight, x, bias = random_bf16((48, 128), 7), random_bf16((4, 128), 8), random_bf16((1, 48), 9)
    sums = REFERENCES[family](weight, from_bf16(x), 0) + from_bf16(bias)
    assert same_floats(Product(weight, isa)(x, Order(family), bias=bias), to_bf16(sums))


@pytest.mark.parametrize(("family", "isa"), CASES)
def test_damaged_parts_are_refused(family: str, isa: str) -> None:
    """Digits that ask for more or fewer exponents than the tail has: an error, never another result."""
    product = Product(random_bf16((64, 256), 10), isa)
    x = random_bf16((6, 256), 11)
    rng = np.random.default_rng(12)
    sound = product.parts["digits"].copy()
    for _ in range(40):
        at, value = rng.integers(sound.size), rng.integers(256)
        damaged = sound.copy()
        damaged[at] = value
        same_threes = all((damaged[at] >> s & 3 == 3) == (sound[at] >> s & 3 == 3) for s in (0, 2, 4, 6))
        product.parts["digits"] = damaged
        count = [sum(int(b) >> s & 3 == 3 for s in (0, 2, 4, 6)) for b in (damaged[at], sound[at])]
        if count[0] == count[1] or same_threes:
            product(x, Order(family))  # other weights, which no kernel can know
        else:
            with pytest.raises(CorruptTensorError):
                product(x, Order(family))
    product.parts["digits"] = np.full_like(sound, 0xFF)
    with pytest.raises(CorruptTensorError):
        product(x, Order(family))


def test_every_family_has_a_kernel_for_each_level() -> None:
    """A forced level never falls back to nothing."""
    for isa, supported in cpu.implementations().items():
        if supported:
            with cpu.force(isa):
                assert all(native.implementation(family) for family in FAMILIES)
