"""``bitforbit verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitforbit.cli import EXIT_VERIFICATION_FAILED, options, output
from bitforbit.cli.progress import progress_bar

_SHOWN_FAILURES = 20


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model directory or shard.")],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="ORIGINAL", help="Compare with the original too (or its Hub name)."),
    ] = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Check every checksum and decode everything; nothing is written. Exit code 1 if anything is wrong."""
    from bitforbit.archive import verify
    from bitforbit.cli.source import resolve

    original = None if against is None else resolve(against, silent=quiet or json)
    with progress_bar(silent=quiet or json) as progress:
        report = verify(directory, against=original, threads=options.thread_count(threads), progress=progress)
    if json:
        from bitforbit.cli.sizes import stored_sizes

        output.print_json({"original_bytes": report.restored_bytes, **stored_sizes(directory), **report.to_json()})
    else:
        for failure in report.errors[:_SHOWN_FAILURES]:
            where = failure.path + (f", tensor {failure.tensor}" if failure.tensor else "")
            output.print_line(f"FAILED {where}: {failure.message} [{failure.error}]")
        if len(report.errors) > _SHOWN_FAILURES:
            output.print_line(f"... and {len(report.errors) - _SHOWN_FAILURES} more (--json lists them all)")
        for name in report.unknown_files:
            output.print_line(f"note: {name} does not belong to the compressed model")
        compared = "" if against is None else f" The restored bytes are those of {against}."
        output.print_facts(
            f"OK.{compared}" if report.ok else f"{len(report.errors)} failure(s)",
            [
                ("checked", f"{report.files} file(s), {report.tensors} tensors"),
                ("restored", output.size(report.restored_bytes)),
                ("time", f"{output.duration(report.seconds)} ({output.rate(report.restored_bytes, report.seconds)})"),
            ],
        )
    if not report.ok:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)
