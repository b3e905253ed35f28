"""Searches the order and the variants of a shape that are fastest on the GPU at hand. Timing is the caller's.

Splits and instruction are the order of summation, so one choice of them serves all numbers of tokens: the one with the
lowest geometric mean of its times, each relative to the best for that many tokens. Variants change no bits and are
chosen for each number of tokens. What the estimates say stays unless something else is faster by more than noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def orders(rows: tuple[int, ...], cols: int, properties: DeviceProperties) -> tuple[Order, ...]:
    """The orders of summation that are compared, the estimated one first."""
    most = min(LARGEST_SPLITS, -(-cols // TILE_COLS))
    splits = dict.fromkeys((estimate_splits(rows, cols, properties), *(count for count in SPLITS if count <= most)))
    known = [instruction for instruction in plans.instructions(properties) if INSTRUCTIONS[instruction] == K_STEP]
    return tuple(Order(cols, count, instruction=instruction) for instruction in known for count in splits)


def case(
    rows: tuple[int, ...], order: Order, tokens: int, properties: DeviceProperties, variant: Variant | None = None
) -> Case | None:
    """A launch by a variant, the default one if none is given; None if there cannot be such a launch."""
    chosen = variant or plans.choose_variant(tokens, properties, order.instruction)
    try:
        plans.plan(rows, order, tokens, properties, chosen)
    except UsageError:  # too many units for the workspace
        return None
    return Case(rows, order, tokens, chosen)


def tune(
    rows: tuple[int, ...],
    cols: int,
    properties: DeviceProperties,
    microseconds: Microseconds,
    rooms: tuple[int, ...] = ROOMS,
) -> tuple[tuned.Choice, tuple[Measured, ...]]:
    """The choice for matrices [rows[i], cols] of one launch, and all that was measured for it. Raises UsageError.

    First orders are compared, by the default variants; then, for the best one, all variants.
    """
    compared = orders(rows, cols, properties)
    cases = [case(rows, order, room, properties) for room in rooms for order in compared]
    measured = [Measured(one, microseconds(one)) for one in cases if one is not None]
    order = best_order(measured, compared[0])
    for room in rooms:
        default, *_ = (one.case.variant for one in measured if (one.case.order, one.case.tokens) == (order, room))
        for variant in plans.variants(room, properties, order.instruction):
            other = None if variant == default else case(rows, order, room, properties, variant)
            measured += [] if other is None else [Measured(other, microseconds(other))]
    return choose(measured, compared[0], order, properties), tuple(measured)


def best_order(measured: Sequence[Measured], estimated: Order) -> Order:
    """The order for all numbers of tokens. Raises UsageError if none was measured for all of them."""
    times = {(one.case.order, one.case.tokens): one.microseconds for one in measured}
    rooms = {tokens for _, tokens in times}
    fastest = {room: min(time for (_, tokens), time in times.items() if tokens == room) for room in rooms}

    def loss(order: Order) -> float:
        return math.exp(sum(math.log(times[order, room] / fastest[room]) for room in rooms) / len(rooms))

    complete = [o for o in dict.fromkeys(order for order, _ in times) if all((o, room) in times for room in rooms)]
    if not complete:
        raise UsageError("expected measurements of one order of summation for all numbers of tokens, got none")
    best = min(complete, key=loss)
    return estimated if estimated in complete and loss(estimated) <= loss(best) * (1 + MARGIN) else best


def choose(measured: Sequence[Measured], estimated: Order, order: Order, properties: DeviceProperties) -> tuned.Choice:
    """An order, and its fastest variant for each number of tokens; what is as estimated is left out."""
    variants = {}
    for room in sorted({one.case.tokens for one in measured}):
        times = {
            one.case.variant: one.microseconds for one in measured if (one.case.order, one.case.tokens) == (order, room)
        }
        fastest = min(times, key=lambda variant: times[variant])
        if times[plans.choose_variant(room, properties, order.instruction)] > times[fastest] * (1 + MARGIN):
            variants[room] = asdict(fastest)
    return tuned.Choice(
        None if order.splits == estimated.splits else order.splits,
        variants,
        None if order.instruction == estimated.instruction else order.instruction,
    )
