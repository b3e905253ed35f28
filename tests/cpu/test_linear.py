"""Products in stated orders, bit for bit against the numpy reference, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitforbit import cpu
from bitforbit.cpu import linear as native
from bitforbit.cpu import planes
from bitforbit.cpu.linear import Order
from bitforbit.errors import BitforbitError, CorruptTensorError, UsageError
from helpers.linear_reference import REFERENCES, from_bf16, same_floats, to_bf16

ISAS = [name for name, supported in cpu.implementations().items() if supported]
ORDERS = [Order("lanes")]
SHAPES = [(1, 1), (1, 31), (3, 32), (16, 33), (17, 64), (15, 65), (33, 96), (5, 97), (16, 128), (40, 200), (2, 1100)]


def as_bytes(array: np.ndarray) -> planes.Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Matrix:
    """A BF16 matrix and its parts."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words
        self.rows, self.cols = words.shape
        rows_per_table, self.parts = planes.encode(as_bytes(words), "BF16", False, self.rows, self.cols, 0, 1)
        self.geometry = (self.rows, self.cols, rows_per_table)


def multiply(
    matrix: Matrix, x: np.ndarray, order: Order, bias: np.ndarray | None = None, threads: int = 1, dense: bool = False
) -> np.ndarray:
    """x and bias are uint16 (BF16) or float32."""
    dtype = {2: "BF16", 4: "F32"}
    out = np.full((len(x), matrix.rows), 7, x.dtype)
    rest = (
        as_bytes(x),
        dtype[x.itemsize],
        out.reshape(-1).view(np.uint8),
        None if bias is None else as_bytes(bias),
        dtype[4 if bias is None else bias.itemsize],
        order,
        threads,
    )
    if dense:
        native.linear_dense(as_bytes(matrix.words), matrix.geometry[:2], *rest)
    else:
        native.linear(matrix.parts, matrix.geometry, *rest)
    return out


def reference(matrix: Matrix, x: np.ndarray, order: Order, bias: np.ndarray | None = None) -> np.ndarray:
    def floats(a: np.ndarray) -> np.ndarray:
        return from_bf16(a) if a.dtype == np.uint16 else a

    with np.errstate(all="ignore"):
        sums = REFERENCES[order.family](matrix.words, floats(x), order.k_block)
        if bias is not None:
            sums = sums + floats(bias)
    return to_bf16(sums) if x.dtype == np.uint16 else sums


def gaussian(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    return to_bf16((np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32))


def activations(tokens: int, cols: int, seed: int, x_dtype: str) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)
    return x if x_dtype == "F32" else to_bf16(x)


def hostile(shape: tuple[int, int], seed: int, x_dtype: str = "BF16", nan: bool = True) -> np.ndarray:
    """Random bits: all exponents, signed zeros, subnormals, and (unless refused) infinities and NaNs."""
    rng = np.random.default_rng(seed)
    if x_dtype == "F32":
        words = rng.integers(0, 1 << 32, shape, np.uint32)
        words = words if nan else np.where(words >> 23 & 255 == 255, words & 0x807FFFFF, words)
        return words.astype(np.uint32).view(np.float32)
    words = rng.integers(0, 1 << 16, shape, np.uint16)
    return words if nan else np.where(words >> 7 & 255 == 255, words & 0x807F, words).astype(np.uint16)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    with cpu.force(request.param):
        yield request.param


def check(matrix: Matrix, x: np.ndarray, order: Order, bias: np.ndarray | None = None) -> None:
    expected = reference(matrix, x, order, bias)
    for dense in (False, True):
        got = multiply(matrix, x, order, bias, threads=1 + dense, dense=dense)
        assert same_floats(got, expected), (matrix.geometry, len(x), order, "dense" if dense else "encoded")


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("x_dtype", ["BF16", "F32"])
def test_ordinary_numbers(isa: str, order: Order, x_dtype: str) -> None:
    for i, shape in enumerate(SHAPES):
        matrix = Matrix(gaussian(shape, i, 0.02))
        for tokens in (1, 2, 5):
            check(matrix, activations(tokens, shape[1], i, x_dtype), order)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("x_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("nan", [True, False])
def test_hostile_numbers(isa: str, order: Order, x_dtype: str, nan: bool) -> None:
    for i, shape in enumerate(SHAPES):
        matrix = Matrix(hostile(shape, i, nan=nan))
        for tokens in (1, 3):
            check(matrix, hostile((tokens, shape[1]), i, x_dtype, nan), order)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_all_patterns(isa: str, order: Order) -> None:
    """Every BF16 pattern as weight, each row against one activation: what a single product does."""
    matrix = Matrix(np.arange(1 << 16, dtype=np.uint16).reshape(2048, 32))
    for word in (0x3F80, 0x0001, 0x8080, 0x7F7F, 0x7F80, 0x7FC1, 0x2000):
        x = np.zeros((1, 32), np.uint16)
        x[0, word % 32] = word
        check(matrix, x, order)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_near_the_smallest_normal_number(isa: str, order: Order) -> None:
    """Products and sums around 2^-126: what is tiny is decided after rounding."""
    rng = np.random.default_rng(0)
    exponents = rng.integers(60, 68, (48, 64)).astype(np.uint16) << 7
    matrix = Matrix(
        exponents
        | rng.integers(0, 2, (48, 64)).astype(np.uint16) << 15
        | rng.integers(0, 128, (48, 64)).astype(np.uint16)
    )
    words = rng.integers(57, 64, (4, 64)).astype(np.uint16) << 7 | rng.integers(0, 128, (4, 64)).astype(np.uint16)
    check(matrix, words, order)
    check(matrix, from_bf16(words) * np.float32(1.0000001), order)


@pytest.mark.parametrize("x_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("bias_dtype", ["BF16", "F32"])
def test_bias(isa: str, x_dtype: str, bias_dtype: str) -> None:
    matrix = Matrix(gaussian((37, 100), 1, 0.02))
    bias = activations(1, 37, 2, bias_dtype)[0]
    for order in ORDERS:
        check(matrix, activations(3, 100, 3, x_dtype), order, bias)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("x_dtype", ["BF16", "F32"])
def test_tokens_and_threads_change_nothing(isa: str, order: Order, x_dtype: str) -> None:
    matrix = Matrix(gaussian((83, 330), 4, 0.02))
    x = activations(17, 330, 5, x_dtype)
    alone = np.concatenate([multiply(matrix, x[i : i + 1], order) for i in range(17)])
    for tokens in range(1, 18):
        for threads in (1, 2, 3):
            got = multiply(matrix, x[17 - tokens :], order, threads=threads)
            assert same_floats(got, alone[17 - tokens :]), (tokens, threads)
    assert same_floats(multiply(matrix, x, order, threads=2, dense=True), alone)


def test_no_tokens(isa: str) -> None:
    matrix = Matrix(gaussian((5, 70), 6))
    assert multiply(matrix, np.zeros((0, 70), np.uint16), Order("lanes")).shape == (0, 5)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_damaged_parts(isa: str, order: Order, tokens: int) -> None:
    """Damage is refused exactly where the decoder refuses it; else the product is that of what it decodes."""
    rng = np.random.default_rng(7)
    refused = 0
    for i in range(60):
        matrix = Matrix(gaussian((33, 130), i, 0.02) if i % 2 else hostile((20, 70), i))
        x = gaussian((tokens, matrix.cols), i)
        for _ in range(rng.integers(1, 4)):
            part = matrix.parts[str(rng.choice(["code", "digits", "sign_mantissa", "tails"]))]
            part[rng.integers(part.size)] ^= np.uint8(1 << rng.integers(8))
        decoded = np.zeros_like(matrix.words)
        shape = matrix.geometry
        try:
            planes.decode(matrix.parts, "BF16", False, shape, (0, matrix.rows), decoded.reshape(-1).view(np.uint8), 1)
        except CorruptTensorError:
            refused += 1
            with pytest.raises(CorruptTensorError, match="expected"):
                multiply(matrix, x, order, threads=2)
        else:
            matrix.words = decoded
            got = multiply(matrix, x, order, threads=2)
            assert same_floats(got, multiply(matrix, x, order, dense=True))
    assert 5 < refused < 55


@pytest.mark.parametrize("part", ["code", "digits", "sign_mantissa", "tails"])
def test_parts_of_other_sizes(isa: str, part: str) -> None:
    matrix = Matrix(gaussian((33, 130), 8))
    x = gaussian((2, 130), 8)
    for size in (0, 60, matrix.parts[part].size - 64, matrix.parts[part].size - 1):
        whole = matrix.parts[part]
        matrix.parts[part] = whole[:size].copy()
        with pytest.raises(CorruptTensorError, match="expected"):
            multiply(matrix, x, Order("lanes"))
        matrix.parts[part] = whole


def test_threads_of_pytorch() -> None:
    """Beside a loaded OpenMP its threads do the work; in a process forked from that one, others."""
    pytest.importorskip("torch")
    script = """
import os, sys, torch
from test_linear import check_threads
from bitforbit.cpu.threads import share_openmp_threads
torch.ones(1 << 20).sum()
assert share_openmp_threads()
check_threads(4)
child = os.fork()
if not child:
    check_threads(4)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, timeout=60, check=True)


def check_threads(threads: int) -> None:
    """A product large enough for several tasks, on that many threads and on one."""
    matrix = Matrix(gaussian((512, 1100), 10, 0.02))
    x = activations(2, 1100, 11, "BF16")
    assert same_floats(multiply(matrix, x, Order("lanes"), threads=threads), multiply(matrix, x, Order("lanes")))


def test_every_family_has_a_reference() -> None:
    assert set(native.families()) == set(REFERENCES)


def test_implementations_are_dispatched() -> None:
    best = ISAS[-1]
    assert native.families()["lanes"]
    with cpu.force(best):
        assert native.implementation("lanes") == best
    with cpu.force("scalar"):
        assert native.implementation("lanes") == native.implementation("lanes", "F32") == "scalar"


def test_wrong_arguments() -> None:
    matrix = Matrix(gaussian((5, 70), 9))
    x = gaussian((2, 70), 9)
    out = np.zeros((2, 5), np.uint16)

    def call(**changes: object) -> None:
        arguments: dict[str, object] = {
            "parts": matrix.parts, "geometry": matrix.geometry, "x": as_bytes(x), "x_dtype": "BF16",
            "out": out.reshape(-1).view(np.uint8), "bias": None, "bias_dtype": "F32", "order": Order("lanes"),
            "threads": 1,
        }  # fmt: skip
        native.linear(**{**arguments, **changes})  # type: ignore[arg-type]

    call()
    for changes in (
        {"geometry": (6, 70, 64)},
        {"geometry": (0, 70, 64)},
        {"geometry": (5, 70, 63)},
        {"x": as_bytes(x)[:-1]},
        {"out": np.zeros(19, np.uint8)},
        {"x_dtype": "F16"},
        {"bias": np.zeros(10, np.uint8)},
        {"order": Order("abacus")},
        {"order": Order("lanes", -1)},
        {"order": Order("lanes", 512)},
    ):
        with pytest.raises(UsageError, match="expected"):
            call(**changes)
    with pytest.raises(BitforbitError, match="code"):
        call(geometry=(5, 70, 16), parts={**matrix.parts, "code": matrix.parts["code"][:0]})
    with pytest.raises(UsageError, match="bytes of weights"):
        native.linear_dense(
            np.zeros(4, np.uint8), (5, 70), as_bytes(x), "BF16", as_bytes(out), None, "F32", Order("lanes"), 1
        )
