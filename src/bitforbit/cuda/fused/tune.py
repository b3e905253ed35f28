"""Searches the order and the variants of a shape that are fastest on the GPU at hand. Timing is the caller's.

Splits and instruction are the order of summation, so one choice of them serves all numbers of tokens: the one with the
lowest geometric mean of its times, each relative to the best for that many tokens. Variants change no bits and are
chosen for each number of tokens. What the estimates say stays unless something else is faster by more than noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused import tuned
from bitforbit.cuda.fused.order import INSTRUCTIONS, LARGEST_SPLITS, Order, estimate_splits
from bitforbit.cuda.fused.plan import ALL, Variant
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.cuda.tiles.layout import TILE_COLS
from bitforbit.errors import UsageError

SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
K_STEP = 16
"""Columns of the instructions that are compared: the others are there for other libraries' orders."""
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
    most = min(LARGEST_SPLITS, -(-cols // TILE_COLS))
    splits = dict.fromkeys((estimate_splits(rows, cols, properties), *(count for count in SPLITS if count <= most)))
    cases = []
    for instruction in plans.instructions(properties):
        if INSTRUCTIONS[instruction] != K_STEP:
            continue
        default = plans.choose_variant(tokens, properties, instruction)
        for order in (Order(cols, count, instruction=instruction) for count in splits):
            for variant in dict.fromkeys((default, *plans.variants(tokens, properties, instruction))):
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
    return choose(measured, Order(cols, estimate_splits(rows, cols, properties)), properties), measured


def choose(measured: tuple[Measured, ...], estimated: Order, properties: DeviceProperties) -> tuned.Choice:
    """An order for all numbers of tokens, and a variant for each; what is as estimated is left out."""
    best: dict[tuple[Order, int], Measured] = {}
    """By order and tokens: the fastest variant."""
    for one in measured:
        key = (one.case.order, one.case.tokens)
        if key not in best or one.microseconds < best[key].microseconds:
            best[key] = one
    rooms = sorted({tokens for _, tokens in best})
    fastest = {room: min(one.microseconds for (_, tokens), one in best.items() if tokens == room) for room in rooms}

    def loss(order: Order) -> float:
        ratios = [best[order, room].microseconds / fastest[room] for room in rooms]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    complete = [order for order in dict.fromkeys(order for order, _ in best) if all((order, r) in best for r in rooms)]
    if not complete:
        raise UsageError("expected measurements of one order of summation for all numbers of tokens, got none")
    order = min(complete, key=loss)
    if estimated in complete and loss(estimated) <= loss(order) * (1 + MARGIN):
        order = estimated
    variants = {}
    for room in rooms:
        found, default = best[order, room], plans.choose_variant(room, properties, order.instruction)
        cases = {one.case.variant: one for one in measured if (one.case.order, one.case.tokens) == (order, room)}
        if default not in cases or cases[default].microseconds > found.microseconds * (1 + MARGIN):
            variants[room] = asdict(found.case.variant)
    return tuned.Choice(
        None if order.splits == estimated.splits else order.splits,
        variants,
        None if order.instruction == estimated.instruction else order.instruction,
    )
