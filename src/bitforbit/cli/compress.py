"""``bitforbit compress``."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bitforbit.cli import options, output
from bitforbit.cli.progress import progress_bar

_NAMED = 5
"""Missing files that a warning names."""


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
    shards: Annotated[
        str | None,
        typer.Option("--shards", metavar="I/N", help="Compress the I-th N-th of the files only; then see --merge."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Make DST of what --shards wrote, once every part is done.")
    ] = False,
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
    from bitforbit import archive
    from bitforbit.cli.source import resolve
    from bitforbit.errors import UsageError

    part = None if shards is None else _part(shards)
    if merge and (part or units or format is not Format.planes):
        raise UsageError("--merge goes with SRC, DST, --include, --exclude and --overwrite only")
    path = resolve(source, silent=quiet or json)
    if merge:
        report = archive.merge(path, destination, include=include, exclude=exclude, overwrite=overwrite)
    else:
        with progress_bar(silent=quiet or json) as progress:
            report = archive.compress(
                path,
                destination,
                format=format.value,
                units=None if units is None else _units(units),
                threads=options.thread_count(threads),
                include=include or (),
                exclude=exclude or (),
                overwrite=overwrite,
                resume=resume,
                part=part,
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
            *([] if part is None else [("next", _next(report.remaining_files))]),
        ],
    )
    if report.missing_files:
        names = ", ".join(report.missing_files[:_NAMED]) + (", ..." if len(report.missing_files) > _NAMED else "")
        output.warn(
            f"{source}: an index names {len(report.missing_files)} file(s) that are not there ({names}); if the "
            "download was incomplete, complete it and compress again"
        )


def _part(text: str) -> tuple[int, int]:
    from bitforbit.errors import UsageError

    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None:
        raise UsageError(f"--shards: expected I/N such as 3/8, got {text!r}")
    return int(match[1]), int(match[2])


def _next(remaining_files: int) -> str:
    if remaining_files:
        return f"{remaining_files} file(s) of other parts are not finished"
    return "every part is done: run bitforbit compress SRC DST --merge"


def _units(path: Path) -> Any:
    from bitforbit.errors import UsageError

    value = options.read_json(path, "units")
    if not isinstance(value, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()
    ):
        raise UsageError(f"{path}: expected an object that gives each pattern its list of module names")
    return value
