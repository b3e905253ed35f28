"""``bitforbit inspect``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitforbit.cli import options, output
from bitforbit.cli.progress import progress_bar

if TYPE_CHECKING:
    from bitforbit.archive import InspectReport, TensorReport

_MAX_ROWS = 40

_HEADINGS = ("tensor", "dtype", "shape", "original", "stored", "bits/weight", "bound", "above it", "entropy")


def command(
    source: Annotated[
        str,
        typer.Argument(metavar="DIR|FILE", help="Model directory or .safetensors file, compressed or not; Hub model."),
    ],
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Save a picture: exponents, and sizes by tensor.")
    ] = None,
    all_tensors: Annotated[bool, typer.Option("--all", help="A line for every tensor.")] = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Show sizes, bits per weight and the distance to the entropy bound; for a plain model, a forecast.

    The bound is the entropy of the exponents plus the bits of sign and mantissa.
    """
    from bitforbit.archive import inspect
    from bitforbit.archive.source import df11_config
    from bitforbit.cli.source import resolve

    if plot is not None:
        from bitforbit.cli.plot import check_plot

        check_plot(plot)
    path = resolve(source, silent=quiet or json)
    count = options.thread_count(threads)
    with progress_bar(silent=quiet or json) as progress:
        report = inspect(path, threads=count, progress=progress)
        if plot is not None:
            from bitforbit.cli.histograms import exponent_counts
            from bitforbit.cli.plot import save_plot

            save_plot(plot, source, report, summarize(report.tensors), exponent_counts(path, count, progress))
    if json:
        total = report.total
        output.print_json(
            {
                "original_bytes": total.original_bytes,
                "compressed_bytes": total.stored_bytes,
                "bits_per_weight": total.bits_per_weight,
                **report.to_json(),
            }
        )
        return
    _show(source, report, all_tensors)
    if path.is_dir() and df11_config(path):
        output.print_line("This is a DFloat11 model: its stored parts are shown. Decompress it to see its weights.")
    if plot is not None:
        output.print_line(f"picture: {plot}")


@dataclass(frozen=True)
class Row:
    """Tensors of one dtype and shape whose names differ in numbers only. Sizes in bytes, rates in bits."""

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    elements: int
    original_bytes: int
    stored_bytes: int | None
    bits_per_weight: float | None
    shannon_bound: float | None
    exponent_entropy: float | None

    @property
    def distance(self) -> float | None:
        """Bits per weight above the bound."""
        if self.bits_per_weight is None or self.shannon_bound is None:
            return None
        return self.bits_per_weight - self.shannon_bound


def pattern(name: str) -> str:
    """A tensor's name with its layer and expert numbers replaced by ``*``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def summarize(tensors: Sequence[TensorReport]) -> list[Row]:
    """One row for all tensors that are alike, the largest first."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorReport]] = {}
    for tensor in tensors:
        groups.setdefault((pattern(tensor.name), tensor.dtype, tuple(tensor.shape)), []).append(tensor)
    rows = [_row(members[0].name if len(members) == 1 else key[0], members) for key, members in groups.items()]
    return sorted(rows, key=lambda row: -row.original_bytes)


def _row(name: str, members: Sequence[TensorReport]) -> Row:
    elements = sum(t.elements for t in members)
    stored = [t.stored_bytes for t in members if t.stored_bytes is not None]
    stored_bytes = sum(stored) if len(stored) == len(members) else None

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Row(
        name=name,
        count=len(members),
        dtype=members[0].dtype,
        shape=tuple(members[0].shape),
        elements=elements,
        original_bytes=sum(t.original_bytes for t in members),
        stored_bytes=stored_bytes,
        bits_per_weight=None if stored_bytes is None or not elements else 8 * stored_bytes / elements,
        shannon_bound=mean([t.shannon_bound for t in members]),
        exponent_entropy=mean([t.exponent_entropy for t in members]),
    )


def _show(source: str, report: InspectReport, all_tensors: bool) -> None:
    tensors, total = report.tensors, report.total
    one_by_one = all_tensors or len(tensors) <= _MAX_ROWS
    rows = [_row(t.name, [t]) for t in tensors] if one_by_one else summarize(tensors)
    shown = rows if all_tensors else rows[:_MAX_ROWS]
    lines = [_cells(row) for row in shown]
    count = f"{len(tensors)} tensors"
    lines.append(
        [
            *(count, total.dtype, f"{total.elements:,}", output.size(total.original_bytes)),
            "-" if total.stored_bytes is None else output.size(total.stored_bytes),
            *(output.number(v) for v in (total.bits_per_weight, total.shannon_bound, total.distance)),
            output.number(total.exponent_entropy),
        ]
    )
    output.print_table(_HEADINGS, lines, left=3, last=True)
    output.print_line()
    if len(shown) < len(rows):
        output.print_line(f"The {len(shown)} largest of {len(rows)} kinds of tensors; --all shows every tensor.")
    elif not one_by_one:
        output.print_line("* stands for layer numbers; --all shows every tensor.")
    if total.stored_bytes is not None:
        output.print_line(
            f"{source}: {'compressed' if report.compressed else 'not compressed; would become'} "
            f"{output.percent(total.stored_bytes, total.original_bytes)} of the weights' original size"
            f" ({output.duration(report.seconds)})"
        )


def _cells(row: Row) -> list[str]:
    shape = " x ".join(str(n) for n in row.shape) or "scalar"
    return [
        row.name if row.count == 1 else f"{row.name} ({row.count})",
        row.dtype,
        shape,
        output.size(row.original_bytes),
        "-" if row.stored_bytes is None else output.size(row.stored_bytes),
        *(output.number(v) for v in (row.bits_per_weight, row.shannon_bound, row.distance, row.exponent_entropy)),
    ]
