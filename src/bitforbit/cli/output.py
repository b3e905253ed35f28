"""What results look like on a terminal. Sizes are decimal: 1 GB is 10^9 bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_GAP = "  "
_MIN_FIRST_COLUMN = 20
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(nbytes: int | float) -> str:
    """Such as ``"15.8 MB"``."""
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole``, such as ``"67.1 %"``."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def rate(nbytes: float, seconds: float) -> str:
    """Such as ``"1.25 GB/s"``."""
    if not nbytes or not seconds:
        return "-"
    value = nbytes / seconds / 1e9
    return f"{value:.2f} GB/s" if value >= 0.095 else f"{value * 1000:.1f} MB/s"


def duration(seconds: float) -> str:
    """Such as ``"0.83 s"`` or ``"2 min 05 s"``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def printable(text: str) -> str:
    """Text as it is, but for what a terminal would obey: names of files and tensors come from strangers."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number(value: float | None) -> str:
    """Two decimals, or a dash for None."""
    return "-" if value is None else f"{value:.2f}"


def print_json(value: Mapping[str, Any]) -> None:
    """The one object on standard output."""
    print(json.dumps(value))


def print_facts(title: str, facts: Iterable[tuple[str, str]], *, to_errors: bool = False) -> None:
    """A short table of names and values under a title; ``to_errors`` sends it to standard error."""
    from rich.markup import escape

    console = _console(to_errors)
    console.print(f"[bold]{escape(printable(title))}[/bold]", soft_wrap=True)
    rows = [(name, printable(value)) for name, value in facts]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        console.print(f"  {escape(name):<{width}}  {escape(value)}", soft_wrap=True)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, last: bool = False) -> None:
    """A table whose first ``left`` columns are left-aligned, the others right-aligned; ``last`` sets off the last row.

    On a terminal that is too narrow the first column loses its beginning.
    """
    from rich.markup import escape

    console = _console()
    lines = [list(headings), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    if console.is_terminal:
        rest = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
        widths[0] = max(min(widths[0], _MIN_FIRST_COLUMN), min(widths[0], console.width - rest))
    for n, line in enumerate(lines):
        cells = [f"{_shortened(line[0], widths[0]):<{widths[0]}}"]
        cells += [
            f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)) if i
        ]
        text = escape(_GAP.join(cells).rstrip())
        is_total = last and n == len(lines) - 1
        console.print(f"[bold]{text}[/bold]" if n == 0 or is_total else text, soft_wrap=True)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[len(text) - length + 3 :]


def print_line(text: str = "") -> None:
    """One line, or several."""
    from rich.markup import escape

    _console().print(escape("\n".join(map(printable, text.split("\n")))), soft_wrap=True)


def warn(text: str) -> None:
    """A line on standard error."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def _console(to_errors: bool = False) -> Any:
    from rich.console import Console

    return Console(highlight=False, stderr=to_errors)
