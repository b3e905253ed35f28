"""The probe: it finds the order of a product, and accepts no other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bitforbit import cpu
from bitforbit.cpu import linear as products
from bitforbit.cpu.linear import Order
from bitforbit.ops import probe, probe_matrix
from helpers.linear_reference import from_bf16, tdpbf16, to_bf16, vdpbf16

ROWS, COLS, TOKENS = 48, 320, 2
Sums = Callable[[np.ndarray, np.ndarray], np.ndarray]


def words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def flushed(sums: np.ndarray) -> torch.Tensor:
    sums = np.where(np.abs(sums) < np.float32(2.0**-126), np.copysign(np.float32(0), sums), sums).astype(np.float32)
    return torch.from_numpy(to_bf16(sums).view(np.int16)).view(torch.bfloat16)


def summing(sums: Sums, round_before_bias: bool = False) -> probe.Linear:
    """A linear that sums like that: weight words and FP32 activations -> FP32 [tokens, rows]."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with np.errstate(all="ignore"):
            total = sums(words(weight), from_bf16(words(x)))
            if bias is None:
                return flushed(total)
            if round_before_bias:
                return flushed(total) + bias
            return flushed(total + from_bf16(words(bias)))

    return linear


def find(linear: probe.Linear, has_bias: bool = False, rows: int = ROWS, cols: int = COLS) -> Order | None:
    return probe.find_order(linear, rows, cols, TOKENS, 1, has_bias)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("k_block", [0, 32, 64, 96, 160, 256])
def test_true_orders_are_found(k_block: int, has_bias: bool) -> None:
    for family, sums in (("vdpbf16", vdpbf16), ("tdpbf16", tdpbf16)):
        found = find(summing(lambda w, x, sums=sums: sums(w, x, k_block)), has_bias)
        # One step of tdpbf16 is 32 columns: blocks of 32 differ from one block only in what is denormal.
        same = (0, 32) if (family, k_block) == ("tdpbf16", 32) else (k_block,)
        assert found in [Order(family, block) for block in same]


@pytest.mark.parametrize("cols", [67, 131, 190])
def test_odd_sizes(cols: int) -> None:
    assert find(summing(lambda w, x: vdpbf16(w, x, 64)), rows=19, cols=cols) == Order("vdpbf16", 64)


def swapped(columns: np.ndarray) -> np.ndarray:
    return columns.reshape(len(columns), -1, 2)[:, :, ::-1].reshape(len(columns), -1)


def blocks_in_reverse(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    parts = [vdpbf16(w[:, k : k + 64], x[:, k : k + 64], 0) for k in range(0, COLS, 64)]
    return sum(parts[-2::-1], parts[-1])


def lanes(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sixteen partial sums of every sixteenth pair, added at the end."""
    pairs = np.arange(COLS).reshape(-1, 2)
    parts = [vdpbf16(w[:, pairs[i::16].ravel()], x[:, pairs[i::16].ravel()], 0) for i in range(16)]
    return sum(parts[1:], parts[0])


def double(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (from_bf16(w).astype(np.float64) @ x.astype(np.float64).T).T.astype(np.float32)


def block_sums_in_double(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    parts = [vdpbf16(w[:, k : k + 64], x[:, k : k + 64], 0).astype(np.float64) for k in range(0, COLS, 64)]
    return sum(parts).astype(np.float32)


WRONG: dict[str, Sums] = {
    "even before odd": lambda w, x: vdpbf16(swapped(w), swapped(x), 64),
    "blocks of no multiple of 32": lambda w, x: vdpbf16(w, x, 48),
    "blocks in reverse": blocks_in_reverse,
    "lanes": lanes,
    "exact": double,
    "block sums in double": block_sums_in_double,
    "columns in reverse": lambda w, x: vdpbf16(w[:, ::-1], x[:, ::-1], 0),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("has_bias", [False, True])
def test_wrong_orders_are_rejected(name: str, has_bias: bool) -> None:
    assert find(summing(WRONG[name]), has_bias) is None


def test_orders_of_other_families_are_rejected() -> None:
    linear = summing(lambda w, x: tdpbf16(w, x, 64))
    assert probe.find_order(linear, ROWS, COLS, TOKENS, 1, False, ["vdpbf16"]) is None
    linear = summing(lambda w, x: vdpbf16(w, x, 64))
    assert probe.find_order(linear, ROWS, COLS, TOKENS, 1, False, ["tdpbf16"]) is None


def test_a_bias_added_after_the_rounding_is_rejected() -> None:
    linear = summing(lambda w, x: vdpbf16(w, x, 64), round_before_bias=True)
    assert find(linear, has_bias=False) == Order("vdpbf16", 64)
    assert find(linear, has_bias=True) is None


def test_one_output_in_another_order_is_enough() -> None:
    """Row 40 in other blocks, or one token of two: kernels treat the ends of a matrix apart."""

    def last_rows(w: np.ndarray, x: np.ndarray) -> np.ndarray:
        sums = vdpbf16(w, x, 64)
        sums[:, 40] = vdpbf16(w[40:41], x, 128)[:, 0]
        return sums

    def last_token(w: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.concatenate([vdpbf16(w, x[:1], 64), vdpbf16(w, x[1:], 128)])

    assert find(summing(last_rows)) is None
    assert find(summing(last_token)) is None


def test_a_linear_that_keeps_denormals_is_rejected() -> None:
    def keeping(w: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The order of vdpbf16 in blocks of 64, every step rounded from double, denormals kept."""
        total = np.zeros((len(x), len(w)), np.float32)
        weight = from_bf16(w).astype(np.float64)
        for begin in range(0, COLS, 64):
            acc = np.zeros_like(total)
            for k in range(begin, begin + 64, 2):
                for column in (k + 1, k):
                    acc = (np.outer(x[:, column], weight[:, column]) + acc).astype(np.float32)
            total = acc if begin == 0 else total + acc
        return total

    rng = np.random.default_rng(0)
    kept, true = summing(keeping), summing(lambda w, x: vdpbf16(w, x, 64))
    ordinary = probe.ordinary(rng, ROWS, COLS, TOKENS, False)
    assert torch.equal(kept(ordinary.x, ordinary.weight, None), true(ordinary.x, ordinary.weight, None))
    assert find(kept) is None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_what_is_found_for_torch_holds(threads: int, has_bias: bool) -> None:
    """Against torch itself: the order found, if any, gives torch's bits on inputs that the probe has not seen."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng = np.random.default_rng(1)
        for rows, cols, tokens in ((256, 1536, 1), (256, 1536, 3), (100, 700, 2), (333, 96, 16)):
            families = [family for family in probe.UNITS if products.implementation(family) != "scalar"]
            order = probe.find_order(
                torch.nn.functional.linear, rows, cols, tokens, threads, has_bias, families or ["vdpbf16"]
            )
            if order is None:
                continue
            for inputs in (
                probe.ordinary(rng, rows, cols, tokens, has_bias),
                probe.cancelling(rng, rows, cols, tokens, has_bias),
            ):
                expected = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
                assert torch.equal(probe._encoded(inputs, order, threads), expected), (rows, cols, tokens, order)
    finally:
        torch.set_num_threads(before)


def test_candidates_are_distinct_and_complete() -> None:
    found = list(probe.candidates(4096, ["vdpbf16", "tdpbf16"]))
    assert len(found) == len(set(found)) == 2 * 4096 // 32
    assert Order("vdpbf16", 500) in probe.candidates(1000, ["vdpbf16"])
    assert found[0] == Order("vdpbf16", 512)
    assert list(probe.candidates(64, ["vdpbf16"])) == [Order("vdpbf16", 0), Order("vdpbf16", 32)]


@pytest.mark.parametrize(("rows", "cols"), [(5000, 512), (4096, 128), (257, 2048), (7, 2048), (300, 33), (9000, 96)])
def test_repeated_rows(rows: int, cols: int) -> None:
    count = probe_matrix.chunk_rows(rows, cols, 64)
    assert 1 <= count <= rows
    chunk = torch.arange(count * cols).remainder(251).to(torch.bfloat16).view(count, cols)
    with probe_matrix.repeated(chunk, rows) as matrix:
        assert matrix.shape == (rows, cols)
        assert torch.equal(matrix, chunk.repeat(-(-rows // count), 1)[:rows])


def test_repeated_rows_without_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_matrix, "_map", lambda chunk, rows: None)
    chunk = torch.randn(64, 64).bfloat16()
    with probe_matrix.repeated(chunk, 200) as matrix:
        assert torch.equal(matrix, chunk.repeat(4, 1)[:200])


def test_mapped_rows_take_no_memory_of_their_own() -> None:
    chunk = torch.ones(1024, 1024, dtype=torch.bfloat16)
    mapped = probe_matrix._map(chunk, 1024 * 1024)  # 2 GiB of addresses
    if mapped is None:
        pytest.skip("no mappings here")
    address, size, memory = mapped
    assert memory[-2:].tolist() == memory[:2].tolist()
    assert probe_matrix._libc().munmap(address, size) == 0


def test_forced_levels_agree() -> None:
    """The order of torch is found, or not, whichever of our implementations is asked."""
    found = set()
    for isa, supported in cpu.implementations().items():
        if supported:
            with cpu.force(isa):
                found.add(find(torch.nn.functional.linear, rows=64, cols=512))
    assert len(found) == 1
