"""Every algorithm in the two-level machine: right results, exact counts, no more fast memory than there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitforbit.errors import IoModelError
from bitforbit.iomodel import (
    ALGORITHMS,
    Algorithm,
    Tiles,
    TwoLevelMemory,
    bounds,
    chooser,
    count,
    lower_bound,
    simulate,
)

Array = npt.NDArray[np.float64]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))
sizes = st.integers(1, 24), st.integers(1, 9), st.integers(0, 600)


def attention(q: Array, k: Array, v: Array) -> Array:
    s = q @ k.T / np.sqrt(q.shape[1])
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v


def inputs(n: int, d: int, scale: float = 1.0) -> tuple[Array, Array, Array]:
    q, k, v = np.random.default_rng(n * 100 + d).standard_normal((3, n, d))
    return q * scale, k, v


@every_algorithm
@settings(max_examples=40, deadline=None)
@given(n=sizes[0], d=sizes[1], more=sizes[2])
def test_results_and_counts(algorithm: Algorithm, n: int, d: int, more: int) -> None:
    q, k, v = inputs(n, d)
    memory = algorithm.least_memory(d) + more
    ran = simulate(algorithm.name, q, k, v, memory)
    np.testing.assert_allclose(ran.slow["O"], attention(q, k, v), rtol=1e-11, atol=1e-12)
    counted = count(algorithm.name, n, d, memory)
    assert (ran.loads, ran.stores, ran.peak) == (counted.loads, counted.stores, counted.peak)
    assert ran.moved == algorithm.words(n, d, memory)
    assert ran.moved >= lower_bound(n, d, memory)
    assert ran.peak <= memory
    assert ran.used == counted.used == 0


@every_algorithm
@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 1 << 17), d=st.integers(1, 1024), more=st.integers(0, 1 << 21))
def test_large_sizes_by_counting(algorithm: Algorithm, n: int, d: int, more: int) -> None:
    memory = algorithm.least_memory(d) + more
    counted = count(algorithm.name, n, d, memory)
    assert counted.moved == algorithm.words(n, d, memory)
    assert counted.moved >= lower_bound(n, d, memory)
    assert counted.peak <= memory


@every_algorithm
def test_least_memory_is_the_least(algorithm: Algorithm) -> None:
    q, k, v = inputs(5, 3)
    least = algorithm.least_memory(3)
    with pytest.raises(IoModelError, match=f"at least {least} words"):
        simulate(algorithm.name, q, k, v, least - 1)
    tiles = algorithm.choose_tiles(5, 3, least)
    with pytest.raises(IoModelError, match="fast memory"):  # the machine itself refuses, whatever chose the tiles
        algorithm.run(TwoLevelMemory(least - 1), 5, 3, tiles)


@every_algorithm
def test_large_scores(algorithm: Algorithm) -> None:
    """Only the published square tiling, with its unshifted exponential, overflows."""
    q, k, v = inputs(12, 4, scale=2000.0)
    with np.errstate(over="ignore", invalid="ignore"):
        out = simulate(algorithm.name, q, k, v, 64).slow["O"]
    if algorithm.name == "square":
        assert not np.isfinite(out).all()
    else:
        np.testing.assert_allclose(out, attention(q, k, v), rtol=1e-9, atol=1e-12)


def test_the_published_sum_of_square_tiling() -> None:
    n, d, b = 96, 48, 8
    assert count("square", n, d, 4 * b * b).moved == 4 * n * n * d // b + n * n + n * d + 2 * n


@pytest.mark.parametrize(
    ("name", "leading"),
    [
        ("standard", lambda n, d, m: 4 * n * n * d / m**0.5 + 4 * n * n),
        ("flash1", lambda n, d, m: 12 * n * n * d * d / m),
        ("flash2", lambda n, d, m: 4 * n * n * d * d / m),
        ("square", lambda n, d, m: 8 * n * n * d / m**0.5 + n * n),
        ("square_improved", lambda n, d, m: 4 * n * n * d / m**0.5 + n * n),
    ],
)
def test_leading_terms(name: str, leading: object) -> None:
    """N >> M >> tile sides >> 1. FlashAttention-1 needs S beside its M words of Q, K, V, O: its tiles are smaller."""
    n, d = 1 << 20, 1 << 11
    m = 1 << 19 if name in ("standard", "square", "square_improved") else 1 << 26
    assert count(name, n, d, m).moved == pytest.approx(leading(n, d, m), rel=0.08)  # type: ignore[operator]


DOCUMENT = Path(__file__).parents[2] / "docs" / "io-model.md"


def test_crossovers_are_those_of_the_document() -> None:
    """Smallest M / d^2 from which FlashAttention-2's order moves fewer words, found by counting, N = 65536."""
    lines = DOCUMENT.read_text().splitlines()
    dims = next([int(cell) for cell in line.split("|")[2:-1]] for line in lines if line.startswith("| d |"))
    assert len(dims) == 5
    for name in ("square_improved", "rectangular"):
        line = next(line for line in lines if line.startswith(f"| `flash2` overtakes `{name}`"))
        for d, cell in zip(dims, line.split("|")[2:-1], strict=True):
            at = chooser.crossover(1 << 16, d, (name,))
            assert at is not None
            assert f"{at / d**2:.2f}" == cell.strip()
            words = {a: count(a, 1 << 16, d, at).moved for a in ("flash2", name)}
            assert words["flash2"] <= words[name]


def test_machine_refuses_misuse() -> None:
    memory = TwoLevelMemory(10, {"Q": np.zeros((4, 4))})
    block = memory.load("Q", slice(0, 2), slice(0, 4))
    with pytest.raises(IoModelError, match="at most 10 words in fast memory, got 8 and 1 x 3 more"):
        memory.allocate(1, 3)
    with pytest.raises(IoModelError, match="a block of 1 x 4, got 2 x 4"):
        memory.store(block, "Q", slice(0, 1), slice(0, 4))
    memory.free(block)
    for use in (lambda: memory.free(block), lambda: memory.compute(lambda x: None, block)):
        with pytest.raises(IoModelError, match="freed"):
            use()
    with pytest.raises(IoModelError, match="at least one word"):
        TwoLevelMemory(0)


def test_undefined_content_is_not_a_number() -> None:
    memory = TwoLevelMemory(10, {})
    memory.declare("O", 2, 2)
    assert np.isnan(memory.slow["O"]).all()
    seen: list[Array] = []
    memory.compute(seen.append, memory.allocate(1, 2))
    assert np.isnan(seen[0]).all()


def test_other_tiles() -> None:
    q, k, v = inputs(10, 6)
    ran = simulate("flash2", q, k, v, 400, Tiles(3, 4, 3, 6))
    np.testing.assert_allclose(ran.slow["O"], attention(q, k, v), rtol=1e-11)
    with pytest.raises(IoModelError, match="at most 40 words"):
        simulate("flash2", q, k, v, 40, Tiles(3, 4, 3, 6))


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3), (4, 3)), ((4,), (4,), (4,))])
def test_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(IoModelError, match="one shape"):
        simulate("flash2", *(np.zeros(shape) for shape in shapes), 100)  # type: ignore[arg-type]
    with pytest.raises(IoModelError, match="among standard, flash1"):
        count("flash3", 4, 4, 100)
    with pytest.raises(IoModelError, match="N: expected at least 1"):
        count("flash2", 0, 4, 100)


def test_bounds() -> None:
    assert bounds.trivial(10, 3) == 120
    assert lower_bound(4096, 64, 1 << 20) == 4 * 4096 * 64
    assert bounds.small_cache(4096, 64, 4096) == 0
    assert lower_bound(4096, 512, 16384) == bounds.small_cache(4096, 512, 16384)
