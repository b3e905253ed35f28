"""The probe for a GPU's order: it finds the order of a product, and accepts no other. Kernels are emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitforbit import ops
from bitforbit.cuda.fused import reference
from bitforbit.cuda.fused.order import Order
from bitforbit.errors import UsageError
from bitforbit.ops import probe
from bitforbit.ops.gpu import order_probe
from bitforbit.ops.gpu.order_probe import Product
from cuda_shim.emulation import HOPPER, EmulatedLauncher, EmulatedQueue
from helpers.order_cases import linear_in, tensor, words

CPU = torch.device("cpu")
ROWS, COLS, TOKENS = 40, 440, 3  # columns: seven tiles, the last one not full


@pytest.fixture(autouse=True)
def ampere() -> Iterator[None]:
    """Kernels on CPU tensors run in the emulation of a GPU without instructions of warpgroups."""
    with ops.gpu.emulate(
        EmulatedQueue(EmulatedLauncher(seed=1, properties=replace(HOPPER, compute_capability=(8, 0))))
    ):
        yield


Sums = Callable[[np.ndarray, np.ndarray], np.ndarray]


def find(linear: probe.Linear, has_bias: bool = False, **sizes: int) -> Order | None:
    product = Product(ROWS, COLS, TOKENS, 2, 256, 256 if has_bias else 0)
    return order_probe.find_order(linear, CPU, replace(product, **sizes))


@pytest.mark.parametrize(
    "order",
    [
        Order(COLS, 1),
        Order(COLS, 1, instruction="mma.m16n8k8"),
        Order(COLS, 4),
        Order(COLS, 4, 2),
        Order(COLS, 3, 2, longer=1),
        Order(COLS, 7, reduction="descending"),
        Order(COLS, 5, reduction="neighbours", partials="BF16"),
        Order(COLS, 6, reduction="halves"),
        Order(COLS, 4, partials="running BF16", instruction="mma.m16n8k8"),
    ],
    ids=lambda o: f"{o.splits}-{o.split_tiles}-{o.rules:b}",
)
def test_true_orders_are_found(order: Order) -> None:
    found = find(linear_in(order))
    assert found is not None
    assert (found.ranges, replace(found, split_tiles=0, longer=0)) == (
        order.ranges, replace(order, split_tiles=0, longer=0),
    )  # fmt: skip


def test_instructions_of_warpgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    """They sum like the others in the emulation, so the others are found first there."""
    order = Order(COLS, 2, reduction="descending")
    with ops.gpu.emulate(EmulatedQueue(EmulatedLauncher(seed=1))):
        assert find(linear_in(order)) == Order(COLS, 2)
        monkeypatch.setattr(order_probe, "instructions", lambda properties: ("wgmma.m64nNk16",))
        assert find(linear_in(order), has_bias=True) == Order(COLS, 2, instruction="wgmma.m64nNk16")


@pytest.mark.parametrize("bias_rounded", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_when_the_bias_is_added(splits: int, bias_rounded: bool) -> None:
    order = Order(COLS, splits, bias_rounded=bias_rounded)
    assert find(linear_in(order), has_bias=True) == order
    assert find(linear_in(order)) == replace(order, bias_rounded=False)


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 17, "cols": 67}, {"rows": 16, "cols": 64, "tokens": 1}, {"tokens": 1, "dims": 1},
        {"tokens": 9, "dims": 3}, {"x_alignment": 2}, {"x_alignment": 16}, {"rows": 1000, "cols": 200},
    ],
    ids=str,
)  # fmt: skip
def test_other_sizes_and_places(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_probe, "_CHUNK_BYTES", 1 << 14)
    seen = []
    order = Order(sizes.get("cols", COLS), 2 if sizes.get("cols", COLS) > 64 else 1)

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append((x.dim(), x.data_ptr() % 256, tuple(weight.shape), x.is_contiguous()))
        return linear_in(order)(x, weight, bias)

    assert find(linear, **sizes) == order
    product = replace(Product(ROWS, COLS, TOKENS, 2, 256, 0), **sizes)
    assert set(seen) == {(product.dims, product.x_alignment % 256, (product.rows, product.cols), True)}


def splits_at(*columns: int) -> Sums:
    def sums(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        total = None
        for begin, end in zip((0, *columns), (*columns, x.shape[1]), strict=True):
            part = in_steps(x[:, begin:end], weight[:, begin:end], 16)
            total = part if total is None else total + part
        return total

    return sums


def in_steps(x: np.ndarray, weight: np.ndarray, step: int, start: np.ndarray | float = 0) -> np.ndarray:
    sums = np.zeros((len(x), len(weight)), np.float32) + np.float32(start)
    for k in range(0, x.shape[1], step):
        sums = reference.mma(sums, x[:, k : k + step], weight[:, k : k + step])
    return sums


def swapped_pair(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Columns 100 and 120, of different instructions, change places."""
    at = np.arange(x.shape[1])
    at[[100, 120]] = at[[120, 100]]
    return in_steps(x[:, at], weight[:, at], 16)


def last_row(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    sums = in_steps(x, weight, 16)
    sums[:, -1] = splits_at(256)(x, weight)[:, -1]
    return sums


def last_token(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    sums = in_steps(x, weight, 16)
    sums[-1] = splits_at(256)(x, weight)[-1]
    return sums


def without_denormals(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    sums = in_steps(x, weight, 16)
    return np.where(np.abs(sums) < 2.0**-126, np.float32(0), sums)


def interleaved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Two accumulators that take every other instruction."""
    step = np.arange(x.shape[1]) // 16 % 2
    return in_steps(x[:, step == 0], weight[:, step == 0], 16) + in_steps(x[:, step == 1], weight[:, step == 1], 16)


def chained(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The second split begins with the first one's sum, rounded to BF16."""
    first = in_steps(x[:, :256], weight[:, :256], 16)
    rounded = (reference.to_bf16(first).astype(np.uint32) << 16).view(np.float32)
    return in_steps(x[:, 256:], weight[:, 256:], 16, rounded)


WRONG: dict[str, Sums] = {
    "splits within a tile": splits_at(96),
    "splits of no rule": splits_at(64, 384),
    "steps of 4": lambda x, weight: in_steps(x, weight, 4),
    "steps of 32": lambda x, weight: in_steps(x, weight, 32),
    "columns in reverse": lambda x, weight: in_steps(x[:, ::-1], weight[:, ::-1], 16),
    "one swapped pair": swapped_pair,
    "exact": lambda x, weight: (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32),
    "interleaved": interleaved,
    "chained": chained,
    "last row": last_row,
    "last token": last_token,
    "denormals are flushed": without_denormals,
}


def linear_of(sums: Sums) -> probe.Linear:
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        def padded(tensor: torch.Tensor) -> np.ndarray:
            return np.pad(tensor.float().numpy(), ((0, 0), (0, -tensor.shape[1] % 64)))

        with np.errstate(all="ignore"):
            return tensor(reference.to_bf16(sums(padded(x), padded(weight))))

    return linear


def test_linears_of_these_tests() -> None:
    assert find(linear_of(lambda x, weight: in_steps(x, weight, 16))) == Order(COLS, 1)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_orders_are_rejected(name: str) -> None:
    assert find(linear_of(WRONG[name])) is None


def test_nans_of_other_bits_are_rejected() -> None:
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = linear_in(Order(COLS, 1))(x, weight, bias)
        return tensor(np.where(words(out) == 0x7FFF, np.uint16(0x7FC0), words(out)))

    assert find(linear) is None


def test_sums_that_change_from_run_to_run_are_rejected() -> None:
    orders: Iterator[Order] = iter([Order(COLS, 1), Order(COLS, 2)])
    assert find(lambda x, weight, bias: linear_in(next(orders))(x, weight, bias)) is None


def test_inputs_that_tell_nothing_prove_nothing() -> None:
    """Of 16 products at most, all in one instruction, nothing is lost: any order would agree."""
    assert find(linear_in(Order(16, 1)), cols=16) is None


def every_candidate() -> list[Order]:
    return [o for name in ("mma.m16n8k16", "mma.m16n8k8") for o in order_probe.candidates(COLS, name)]


def test_candidates_are_distinct() -> None:
    found = every_candidate()
    assert len(found) == len(set(found))
    assert found[0] == Order(COLS, 1)
    assert len({(o.ranges, o.reduction, o.partials, o.instruction) for o in found}) == len(found)
    assert {Order(COLS, 7, reduction="halves"), Order(COLS, 4, 2), Order(COLS, 2, partials="BF16")} <= set(found)
    assert len(list(order_probe.candidates(14336, "mma.m16n8k16"))) < 1000
    assert len(list(order_probe.candidates(64, "mma.m16n8k8"))) == 1


def test_candidates_give_different_bits() -> None:
    """So what is found is the only one."""
    rng, found = (
        np.random.default_rng(0),
        [o for name in ("mma.m16n8k16", "mma.m16n8k8") for o in order_probe.candidates(COLS, name)],
    )
    bits = [b""] * len(found)
    for make in (probe.cancelling, order_probe.within_tiles, *[order_probe.between_tiles] * 4):
        inputs = make(rng, 40, COLS, 4, False)
        for i, order in enumerate(found):
            bits[i] += reference.linear(words(inputs.x), words(inputs.weight), order).tobytes()
    assert len(set(bits)) == len(found)


def test_a_cpu_without_emulation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_probe.queues, "_emulations", [])
    with pytest.raises(UsageError, match="CUDA device"):
        find(linear_in(Order(COLS, 1)))
