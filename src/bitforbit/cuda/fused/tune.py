"""Searches the splits and the variants of a shape that are fastest on the GPU at hand. Timing is the caller's.

Splits are part of the order of summation, so one number of them serves all numbers of tokens: the one with the lowest
geometric mean of its times, each relative to the best for that many tokens. Variants change no bits and are chosen for
each number of tokens. What the estimates say stays unless something else is faster by more than noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused import tuned
from bitforbit.cuda.fused.order import LARGEST_SPLITS, Order, estimate_splits
from bitforbit.cuda.fused.plan import ALL, Variant
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles.layout import TILE_COLS
from bitforbit.errors import UsageError

SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
ROOMS = tuple(sorted({variant.tokens for variant in ALL}))
"""Numbers of tokens that are measured: each variant's most."""
MARGIN = 0.02
"""A gain that is taken for one: medians of repeated rounds differ by less."""


@dataclass(frozen=True)
class Case:
    """A launch to be timed: matrices [rows[i], cols] in one order, by one variant."""

    rows: tuple[int, ...]
    order: Order
    tokens: int
    variant: Variant


Microseconds = Callable[[Case], float]
"""The time of a launch."""


@dataclass(frozen=True)
class Measured:
    """A launch and its time."""

    case: Case
    microseconds: float


def candidates(rows: tuple[int, ...], cols: int, tokens: int, properties: DeviceProperties) -> tuple[Case, ...]:
    """The launches that are compared for a number of tokens, the one that the estimates say first."""
    estimated = estimate_splits(rows, cols, properties)
    most = min(LARGEST_SPLITS, -(-cols // TILE_COLS))
    default = plans.choose_variant(tokens, properties)
    cases = []
    for splits in dict.fromkeys((estimated, *(count for count in SPLITS if count <= most))):
        for variant in dict.fromkeys((default, *plans.variants(tokens, properties))):
            order = Order(cols, splits)
            try:
                plans.plan(rows, order, tokens, properties, variant)
            except UsageError:  # too many units for the workspace
                continue
            cases.append(Case(rows, order, tokens, variant))
    return tuple(cases)


def tune(
    rows: tuple[int, ...],
    cols: int,
    properties: DeviceProperties,
    microseconds: Microseconds,
    rooms: tuple[int, ...] = ROOMS,
) -> tuple[tuned.Choice, tuple[Measured, ...]]:
    """The choice for matrices [rows[i], cols] of one launch, and all that was measured for it. Raises UsageError."""
    measured = tuple(
        Measured(case, microseconds(case)) for room in rooms for case in candidates(rows, cols, room, properties)
    )
    return choose(measured, estimate_splits(rows, cols, properties), properties), measured


def choose(measured: tuple[Measured, ...], estimated: int, properties: DeviceProperties) -> tuned.Choice:
    """Splits for all numbers of tokens, and a variant for each; what is as estimated is left out."""
    best: dict[tuple[int, int], Measured] = {}
    """By splits and tokens: the fastest variant."""
    for one in measured:
        key = (one.case.order.splits, one.case.tokens)
        if key not in best or one.microseconds < best[key].microseconds:
            best[key] = one
    rooms = sorted({tokens for _, tokens in best})
    fastest = {room: min(one.microseconds for (_, tokens), one in best.items() if tokens == room) for room in rooms}

    def loss(splits: int) -> float:
        ratios = [best[splits, room].microseconds / fastest[room] for room in rooms]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    complete = [splits for splits in sorted({s for s, _ in best}) if all((splits, room) in best for room in rooms)]
    if not complete:
        raise UsageError("expected measurements of one number of splits for all numbers of tokens, got none")
    splits = min(complete, key=loss)
    if estimated in complete and loss(estimated) <= loss(splits) * (1 + MARGIN):
        splits = estimated
    variants = {}
    for room in rooms:
        found, default = best[splits, room], plans.choose_variant(room, properties)
        before = [
            m.microseconds
            for m in measured
            if (m.case.order.splits, m.case.tokens, m.case.variant) == (splits, room, default)
        ]
        if not before or before[0] > found.microseconds * (1 + MARGIN):
            variants[room] = asdict(found.case.variant)
    return tuned.Choice(None if splits == estimated else splits, variants)
