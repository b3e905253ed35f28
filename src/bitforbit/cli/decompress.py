"""``bitforbit decompress``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from bitforbit.cli import options, output
from bitforbit.cli.progress import progress_bar


def command(
    source: options.Source,
    destination: options.Destination,
    threads: options.Threads = None,
    shapes: Annotated[
        Path | None,
        typer.Option(
            "--shapes",
            metavar="FILE",
            help='JSON object {"name": \\[rows, columns]}, for DFloat11 models that lack them.',
        ),
    ] = None,
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Check every file's SHA-256 too, not only its XXH3-128 (slower).")
    ] = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Restore the original files of a compressed model, byte for byte; a DFloat11 model becomes a plain one."""
    from bitforbit.archive import decompress
    from bitforbit.cli.source import resolve

    path = resolve(source, silent=quiet or json)
    with progress_bar(silent=quiet or json) as progress:
        report = decompress(
            path,
            destination,
            threads=options.thread_count(threads),
            shapes=None if shapes is None else _shapes(shapes),
            sha256=sha256,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    if json:
        from bitforbit.cli.sizes import bits_per_weight

        rate = bits_per_weight(path, destination)
        output.print_json({"original_bytes": report.restored_bytes, "bits_per_weight": rate, **report.to_json()})
        return
    checks = "plain weights" if report.format == "df11" else "every file has the XXH3-128 of the original"
    if report.sha256:
        checks = "every file has the SHA-256 of the original"
    output.print_facts(
        f"{source} -> {destination}",
        [
            ("compressed", output.size(report.compressed_bytes)),
            ("restored", f"{output.size(report.restored_bytes)} in {report.files} file(s): {checks}"),
            ("tensors", str(report.tensors)),
            (
                "time",
                f"{output.duration(report.seconds)} ({output.rate(report.restored_bytes, report.seconds)})"
                + (f", {report.resumed_files} file(s) done before" if report.resumed_files else ""),
            ),
        ],
    )


def _shapes(path: Path) -> Mapping[str, Sequence[int]]:
    from bitforbit.errors import UsageError

    value = options.read_json(path, "shapes")
    if not isinstance(value, dict) or not all(
        isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape) for shape in value.values()
    ):
        raise UsageError(f"{path}: expected an object that gives each tensor's name its list of dimensions")
    return value
