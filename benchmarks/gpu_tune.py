"""Which splits and variants are fastest here: times those of fused products by shape, and writes the package's table.

Every variant and number of splits is compared with the same sums from BF16 weights, bit by bit, before it is timed. All
are measured anew, whatever table there is. With --write the choices go to the package's table of this kind of GPU,
``cuda/fused/tuned/<device>.json``, which all later products there follow: other splits are another order of summation,
so the bits of fused products change with them.

    python -m benchmarks.gpu_tune [--model Llama-3.1-8B] [--extra] [--write] [--dry-run] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_common
from benchmarks.common import machine, table
from benchmarks.gpu_common import Meter, Report
from benchmarks.gpu_operands import Operands
from benchmarks.gpu_shapes import MODELS, Shape
from bitforbit.cuda.fused import tune, tuned
from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.fused.plan import Variant
from bitforbit.cuda.fused.tune import Case, Measured
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.ops import gpu

EXTRA = (
    Variant(8, 1, 8, 2, 3),
    Variant(8, 1, 16, 2, 1),
    Variant(8, 2, 4, 4, 3),
    Variant(16, 1, 8, 2, 3),
    Variant(16, 2, 4, 4, 2),
    Variant(32, 2, 8, 2, 1),
    Variant(64, 2, 8, 2, 1),
)
"""Variants that the package does not have: measured with --extra, to see whether it should."""
Choices = dict[tuple[tuple[int, ...], int], tuned.Choice]

ROUNDS = 9
SETS = 3
"""Of rounds, of which the fastest counts: what else happens on the device only adds time."""


@dataclass(frozen=True)
class Size:
    """What is tuned for."""

    shapes: tuple[Shape, ...]
    rooms: tuple[int, ...]
    extra: tuple[Variant, ...] = ()


FULL = Size(tuple(shape for model in MODELS for shape in model.shapes), tune.ROOMS)
TINY = Size((Shape("tiny", "down", (49,), 192),), (8,), EXTRA[:1])


class Stopwatch:
    """Times launches of a shape. In a dry run all take equally long."""

    def __init__(self, meter: Meter, shape: Shape) -> None:
        self.properties = gpu.queue_for(meter.device).properties
        self._meter = meter
        self._operands = Operands(meter, shape)

    def microseconds(self, case: Case) -> float:
        """Of one launch, after its gate. Raises AssertionError."""
        arguments = (case.tokens, case.order, case.variant)
        self._operands.check_product(*arguments)
        graphs = {"fused": self._meter.capture(self._operands.products(*arguments))}
        times = [gpu_common.median(self._meter.in_turns(graphs, ROUNDS)["fused"]) for _ in range(SETS)]
        return min((time for time in times if time is not None), default=1.0)


def search(
    meter: Meter, shape: Shape, size: Size, report: Report
) -> tuple[tuned.Choice, tuple[Measured, ...], list[Measured]]:
    """The choice for a shape, what was measured for it, and the package's variants-to-be with the chosen splits."""
    watch, extra = Stopwatch(meter, shape), []
    choice, measured = tune.tune(shape.rows, shape.cols, watch.properties, watch.microseconds, size.rooms)
    order = Order(shape.cols, choice.splits or measured[0].case.order.splits)  # of the instruction that they have
    for variant in size.extra:
        if variant.tokens in size.rooms and variant.shared_bytes() <= watch.properties.shared_bytes_per_block:
            case = Case(shape.rows, order, variant.tokens, variant)
            time = report.attempt(f"{shape.name}, {variant}", lambda case=case: watch.microseconds(case))
            extra += [] if time is None else [Measured(case, time)]
    return choice, measured, extra


def measure(meter: Meter, size: Size, report: Report) -> Choices:
    """The choices by shape."""
    found: Choices = {}
    lines: list[dict[str, Any]] = []
    report.put(shapes=lines)
    for shape in size.shapes:
        if (shape.rows, shape.cols) in found:
            continue
        result = report.attempt(shape.name, lambda shape=shape: search(meter, shape, size, report))
        if meter.measures:
            torch.cuda.empty_cache()
        if result is None:
            continue
        choice, measured, extra = result
        found[shape.rows, shape.cols] = choice
        estimated = measured[0].case.order.splits
        lines.append(
            {
                "name": shape.name,
                "estimated": estimated,
                "splits": choice.splits or estimated,
                "instruction": choice.instruction or Order.instruction,
                "variants": dict(choice.variants),
                "times": [
                    {
                        "splits": one.case.order.splits,
                        "instruction": one.case.order.instruction,
                        "tokens": one.case.tokens,
                        "variant": asdict(one.case.variant),
                        "us": one.microseconds if meter.measures else None,
                    }
                    for one in (*measured, *extra)
                ],
            }
        )
        report.put()
    return found


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    lines = []
    for shape in result["shapes"]:
        for tokens in sorted({time["tokens"] for time in shape["times"]}):
            times = [time for time in shape["times"] if time["tokens"] == tokens]
            first, variant = times[0], shape["variants"].get(tokens, times[0]["variant"])
            if shape["instruction"] != Order.instruction and tokens not in shape["variants"]:
                variant = next(t["variant"] for t in times if t["instruction"] == shape["instruction"])
            wanted = (shape["splits"], shape["instruction"], variant)
            chosen = next(t for t in times if (t["splits"], t["instruction"], t["variant"]) == wanted)
            best = min(times, key=lambda time: time["us"] or 0.0)
            lines.append(
                [
                    shape["name"],
                    str(tokens),
                    *(_short(time) for time in (first, chosen, best)),
                    *(gpu_common.cell(time["us"]) for time in (first, chosen, best)),
                ]
            )
    names = ("estimated", "chosen", "best")
    return table(["shape", "tokens", *names, *(f"{name}, us" for name in names)], lines)


def _short(time: dict[str, Any]) -> str:
    return f"{time['splits']} splits, {time['instruction']} {'/'.join(map(str, time['variant'].values()))}"


def write(properties: DeviceProperties, choices: Choices) -> Path:
    """Put choices into the package's table of a GPU; shapes that were not measured stay as they are there."""
    table = {**tuned.load(properties.name, properties.multiprocessors), **choices}
    table = {shape: choice for shape, choice in table.items() if choice != tuned.Choice()}
    path = tuned.FOLDER / tuned.file_name(properties.name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(tuned.render(properties.name, properties.multiprocessors, table, machine=machine()))
    return path


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write if asked to."""
    options = gpu_common.parser(__doc__)
    options.add_argument(
        "--model", choices=[model.name for model in MODELS], action="append", help="for its shapes only"
    )
    options.add_argument("--extra", action="store_true", help="measure variants, too, that the package does not have")
    options.add_argument("--write", action="store_true", help="replace the package's table of this GPU")
    chosen = options.parse_args(arguments)
    if chosen.write and chosen.dry_run:
        options.error("expected --write without --dry-run: a dry run measures nothing")
    size = TINY if chosen.dry_run else FULL
    if chosen.model and not chosen.dry_run:
        size = Size(tuple(shape for shape in size.shapes if shape.model in chosen.model), size.rooms)
    if chosen.extra:
        size = replace(size, extra=EXTRA)
    report = Report(chosen.json)
    with gpu_common.meter(chosen.dry_run) as meter:
        choices = measure(meter, size, report)
        print(show(report.result))
        status = report.end()
        if chosen.write and status == 0:
            print(f"written: {write(gpu.queue_for(meter.device).properties, choices)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
