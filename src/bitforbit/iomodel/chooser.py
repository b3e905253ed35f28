"""Which algorithm moves the fewest words for N, d and M, with which tiles, and how far that is from the lower bound."""

from __future__ import annotations

from dataclasses import dataclass

from bitforbit.iomodel.algorithms import ALGORITHMS, Algorithm
from bitforbit.iomodel.bounds import lower_bound
from bitforbit.iomodel.tiles import Tiles, check

_STEPS = 100


@dataclass(frozen=True)
class Prediction:
    """What one algorithm would do. ``tiles``, ``words`` and ``ratio`` (to the bound) are None if it does not fit."""

    algorithm: Algorithm
    least_memory: int
    tiles: Tiles | None
    words: int | None
    ratio: float | None


@dataclass(frozen=True)
class Choice:
    """Every algorithm for one head of N tokens, d channels, in a fast memory of ``memory`` words."""

    n: int
    d: int
    memory: int
    bound: float
    predictions: tuple[Prediction, ...]

    @property
    def best(self) -> Prediction:
        """The one that moves the fewest words; of equals, the first in the list."""
        return min((p for p in self.predictions if p.words is not None), key=lambda p: p.words or 0)


def choose(n: int, d: int, memory: int) -> Choice:
    """Predict all algorithms. Raises IoModelError for sizes below 1 and a memory in which none runs."""
    least = min(algorithm.least_memory(d) for algorithm in ALGORITHMS.values())
    check(n, d, memory, least, "any algorithm")
    bound = lower_bound(n, d, memory)
    return Choice(n, d, memory, bound, tuple(_predict(a, n, d, memory, bound) for a in ALGORITHMS.values()))


def _predict(algorithm: Algorithm, n: int, d: int, memory: int, bound: float) -> Prediction:
    least = algorithm.least_memory(d)
    if memory < least:
        return Prediction(algorithm, least, None, None, None)
    tiles = algorithm.choose_tiles(n, d, memory)
    words = algorithm.cost(n, d, memory, tiles)
    return Prediction(algorithm, least, tiles, words, words / bound)


def crossover(n: int, d: int, others: tuple[str, ...] = ("square_improved", "rectangular")) -> int | None:
    """Least M from which on FlashAttention-2's order moves no more words than the others; None if there is none.

    Looked for between the least memory and 4 d^2, in steps of one part in a hundred and then closer. Whole tiles make
    the counts jump, so near the crossover there may be single M for which it is the other way round.
    """
    check(n, d, 1, 1, "crossover")
    flash = ALGORITHMS["flash2"]

    def behind(memory: int) -> bool:
        ours = flash.words(n, d, memory)
        return any(ours > ALGORITHMS[name].words(n, d, memory) for name in others)

    low, high = flash.least_memory(d), max(4 * d * d, flash.least_memory(d) + 1)
    if behind(high):
        return None
    while high - low > 1:  # invariant: not behind at high; every pass looks closer at where it was last behind
        step = max(1, (high - low) // _STEPS)
        last = next((m for m in range(high - step, low, -step) if behind(m)), low)
        low, high = last, min(last + step, high)
    return high if behind(low) else low
