"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Model directory, .safetensors file, or Hub model (org/name or org/name@commit)."
    ),
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="What to write; must not exist yet.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=1024, help="Number of threads; default: BITFORBIT_THREADS, else all CPUs."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists, once the result is complete.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]


def thread_count(threads: int | None) -> int:
    """The option's value, else ``BITFORBIT_THREADS``, else the number of CPUs. Raises UsageError."""
    from bitforbit.cpu import default_threads

    return default_threads() if threads is None else threads


def read_json(path: Path, what: str) -> object:
    """Content of a JSON file that an option names. Raises UsageError, or OSError if it cannot be read."""
    import json

    from bitforbit.errors import UsageError

    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: expected a JSON file of {what}, got {e}") from None
    return value
