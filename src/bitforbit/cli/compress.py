"""``bitforbit compress``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bitforbit.cli import options, output
from bitforbit.cli.progress import progress_bar


class Format(str, Enum):  # noqa: UP042 - typer shows the values
    """What to write."""

    planes = "planes"
    df11 = "df11"


def command(
    source: options.Source,
    destination: options.Destination,
    format: Annotated[
        Format, typer.Option("--format", help="The native format, or DFloat11 for other software that reads it.")
    ] = Format.planes,
    threads: options.Threads = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GLOB", help="Compress only tensors of these names.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Store tensors of these names as they are.")
    ] = None,
    units: Annotated[
        Path | None,
        typer.Option("--units", metavar="FILE", help="DFloat11 units: a JSON object like a model's pattern_dict."),
    ] = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Compress a model: a directory with the same files, a third smaller, from which every file comes back exactly."""
    from bitforbit.archive import compress
    from bitforbit.cli.source import resolve

    path = resolve(source, silent=quiet or json)
    with progress_bar(silent=quiet or json) as progress:
        report = compress(
            path,
            destination,
            format=format.value,
            units=None if units is None else _units(units),
            threads=options.thread_count(threads),
            include=include or (),
            exclude=exclude or (),
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    if json:
        output.print_json(report.to_json())
        return
    tensors = str(report.tensors)
    if report.format == Format.planes.value:
        tensors = f"{report.compressed_tensors} of {tensors} compressed, in {report.shards} file(s)"
    output.print_facts(
        f"{source} -> {destination}",
        [
            ("original", output.size(report.original_bytes)),
            (
                "compressed",
                f"{output.size(report.compressed_bytes)} "
                f"({output.percent(report.compressed_bytes, report.original_bytes)})",
            ),
            ("bits/weight", output.number(report.bits_per_weight)),
            ("tensors", tensors),
            (
                "time",
                f"{output.duration(report.seconds)} ({output.rate(report.original_bytes, report.seconds)})"
                + (f", {report.resumed_files} file(s) done before" if report.resumed_files else ""),
            ),
        ],
    )


def _units(path: Path) -> Any:
    from bitforbit.errors import UsageError

    value = options.read_json(path, "units")
    if not isinstance(value, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()
    ):
        raise UsageError(f"{path}: expected an object that gives each pattern its list of module names")
    return value
