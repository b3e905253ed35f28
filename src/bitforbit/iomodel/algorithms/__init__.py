"""The algorithms, by name: how each chooses tiles, how it runs, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitforbit.errors import IoModelError
from bitforbit.iomodel import costs, tiles
from bitforbit.iomodel.algorithms import flash, square, standard
from bitforbit.iomodel.memory import Array, TwoLevelMemory
from bitforbit.iomodel.tiles import Tiles


@dataclass(frozen=True)
class Algorithm:
    """One way of computing softmax(Q K^T / sqrt(d)) V for Q, K, V of N x d in a fast memory of M words."""

    name: str
    title: str
    choose_tiles: Callable[[int, int, int], Tiles]
    """(N, d, M) -> tiles; raises IoModelError where M is below :attr:`least_memory`."""
    least_memory: Callable[[int], int]
    """d -> words of fast memory without which it cannot run."""
    run: Callable[[TwoLevelMemory, int, int, Tiles], None]
    """(memory with Q, K, V, N, d, tiles): leaves O in slow memory."""
    cost: Callable[[int, int, int, Tiles], int]
    """(N, d, M, tiles) -> words moved, in closed form."""

    def words(self, n: int, d: int, memory: int) -> int:
        """Words moved with the tiles chosen for that memory, in closed form. Raises IoModelError."""
        return self.cost(n, d, memory, self.choose_tiles(n, d, memory))


ALGORITHMS: dict[str, Algorithm] = {
    a.name: a
    for a in (
        Algorithm(
            "standard", "standard (S and P in slow memory)",
            tiles.standard, tiles.least_standard, standard.run, costs.standard,
        ),
        Algorithm(
            "flash1", "FlashAttention-1",
            tiles.flash1, tiles.least_flash1, flash.run_keys_outside, costs.flash1,
        ),
        Algorithm(
            "flash2", "FlashAttention-2 order",
            tiles.flash2, tiles.least_flash2, flash.run_queries_outside, costs.flash2,
        ),
        Algorithm(
            "square", "square tiling as published",
            tiles.square, tiles.least_square, square.run_published, costs.square,
        ),
        Algorithm(
            "square_improved", "square tiling, improved",
            tiles.square_improved, tiles.least_improved, square.run_improved, costs.improved,
        ),
        Algorithm(
            "rectangular", "square tiling, output in strips",
            tiles.rectangular, tiles.least_improved, square.run_improved, costs.improved,
        ),
    )
}  # fmt: skip


def find(name: str) -> Algorithm:
    """The algorithm of that name. Raises IoModelError."""
    if name not in ALGORITHMS:
        raise IoModelError(f"expected an algorithm among {', '.join(ALGORITHMS)}, got {name!r}")
    return ALGORITHMS[name]


def simulate(name: str, q: Array, k: Array, v: Array, memory: int, tiles: Tiles | None = None) -> TwoLevelMemory:
    """Compute attention of q, k, v ``[N, d]`` with so many words of fast memory; the result is ``.slow["O"]``."""
    if q.ndim != 2 or q.shape != k.shape or q.shape != v.shape:
        raise IoModelError(f"expected Q, K and V of one shape [N, d], got {q.shape}, {k.shape} and {v.shape}")
    n, d = q.shape
    return _run(find(name), n, d, TwoLevelMemory(memory, {"Q": q, "K": k, "V": v}), tiles)


def count(name: str, n: int, d: int, memory: int, tiles: Tiles | None = None) -> TwoLevelMemory:
    """Walk the same loops without data: ``.loads``, ``.stores``, ``.peak`` are those of :func:`simulate`."""
    return _run(find(name), n, d, TwoLevelMemory(memory), tiles)


def _run(algorithm: Algorithm, n: int, d: int, machine: TwoLevelMemory, tiles: Tiles | None) -> TwoLevelMemory:
    chosen = algorithm.choose_tiles(n, d, machine.words)
    algorithm.run(machine, n, d, tiles or chosen)
    return machine
