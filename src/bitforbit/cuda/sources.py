"""The texts of the kernels, each with the files that it includes put in place."""

from __future__ import annotations

import functools
import re
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"

_INCLUDE = re.compile(r'^\s*#include\s+"([\w./]+)"\s*$')
_ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\(([^),]*)(?:,[^)]*)?\)\s+)?(\w+)\s*\(')
MAX_THREADS = 1024


@functools.cache
def text(source: str) -> str:
    """The text of a file in ``kernels/`` or at an absolute path; every ``#include "..."`` becomes that file, once."""
    return "".join(_lines(source, set()))


def entry_points(source: str) -> tuple[str, ...]:
    """Names of the ``extern "C" __global__`` functions written out in a text."""
    return tuple(launch_bounds(source))


def launch_bounds(source: str) -> dict[str, str]:
    """The entry points of a text, each with the expression of its largest block in threads."""
    return {name: bound.strip() or str(MAX_THREADS) for bound, name in _ENTRY.findall(text(source))}


def _lines(name: str, included: set[str]) -> list[str]:
    included.add(name)
    lines = [f'#line 1 "{name}"\n']
    for number, line in enumerate((KERNELS / name).read_text().splitlines(keepends=True), 1):
        found = _INCLUDE.match(line)
        if found is None:
            lines.append(line)
        elif found[1] not in included:
            lines += [*_lines(found[1], included), f'\n#line {number + 1} "{name}"\n']
        else:
            lines.append("\n")
    return lines
