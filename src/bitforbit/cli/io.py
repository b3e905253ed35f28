"""``bitforbit io``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitforbit.cli import options, output
from bitforbit.errors import UsageError

if TYPE_CHECKING:
    from bitforbit.iomodel import Choice

_HEADINGS = ("algorithm", "tiles", "words moved", "bytes", "x bound", "")
_DEVICE_HELP = "H100, H200, A100, RTX4090 (shared memory of a block) or CPU (its L1); NAME:LEVEL for another level."


def command(
    n: Annotated[int, typer.Option("--n", metavar="N", help="Tokens: queries, and keys.")] = 8192,
    d: Annotated[int, typer.Option("--d", metavar="D", help="Channels of the head.")] = 128,
    memory: Annotated[
        int | None, typer.Option("--memory", metavar="M", help="Fast memory in words, instead of a device's.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help=_DEVICE_HELP)] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="BF16, F16, F32 or F8; default: F32 on CPU, else BF16."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Save a picture of words over fast memory as PNG.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Words that attention moves between slow and fast memory, by algorithm, and the least that any must move.

    Exact counts for one head of N tokens in a two-level memory: nothing is run or measured. Default device: H100.
    """
    from bitforbit.iomodel import choose, crossover

    if plot is not None:
        from bitforbit.cli.plot import check_plot

        check_plot(plot)
    words, dtype, place = _fast_memory(memory, device, dtype)
    choice = choose(n, d, words)
    facts = _facts(choice, crossover(n, d), dtype, place)
    if json:
        output.print_json(facts)
    else:
        show(choice, facts)
    if plot is not None:
        from bitforbit.cli.io_plot import save_plot

        save_plot(plot, choice, place)
        if not json:
            output.print_line(f"picture in {plot}")


def _fast_memory(memory: int | None, device: str | None, dtype: str | None) -> tuple[int, str, str]:
    """Words of fast memory, dtype and a name for the place."""
    from bitforbit.iomodel.machine import ITEM_BYTES, find_fast_level

    if memory is not None and device is not None:
        raise UsageError("expected one of --memory and --device, got both")
    if memory is None:
        machine, level = find_fast_level("H100" if device is None else device)
        chosen = _dtype(dtype, "F32" if machine.name == "CPU" else "BF16")
        return machine.fast_words(chosen, level.name), chosen, f"{machine.name} {level.name}"
    chosen = _dtype(dtype, "BF16")
    return memory, chosen, f"{output.size(memory * ITEM_BYTES[chosen])}"


def _dtype(given: str | None, usual: str) -> str:
    from bitforbit.iomodel.machine import ITEM_BYTES

    if given is None:
        return usual
    if given.upper() not in ITEM_BYTES:
        raise UsageError(f"--dtype: expected {', '.join(ITEM_BYTES)}, got {given!r}")
    return given.upper()


def _facts(choice: Choice, crossover: int | None, dtype: str, place: str) -> dict[str, Any]:
    from bitforbit.iomodel.machine import ITEM_BYTES

    best = choice.best
    return {
        "n": choice.n,
        "d": choice.d,
        "memory_words": choice.memory,
        "memory": place,
        "dtype": dtype,
        "item_bytes": ITEM_BYTES[dtype],
        "lower_bound_words": choice.bound,
        "algorithms": [
            {
                "name": p.algorithm.name,
                "title": p.algorithm.title,
                "fits": p.words is not None,
                "least_memory_words": p.least_memory,
                "tiles": None if p.tiles is None else vars(p.tiles),
                "words": p.words,
                "ratio_to_bound": p.ratio,
            }
            for p in choice.predictions
        ],
        "choice": best.algorithm.name,
        "crossover_words": crossover,
    }


def show(choice: Choice, facts: dict[str, Any]) -> None:
    """Print the table, the choice and the crossover."""
    n, d, memory, item = choice.n, choice.d, choice.memory, facts["item_bytes"]
    output.print_facts(
        f"attention of one head, N = {n:,}, d = {d}, {facts['dtype']}",
        [
            ("fast memory", f"{memory:,} words ({facts['memory']}), {memory / d**2:.2f} d^2"),
            ("lower bound", f"{choice.bound:,.0f} words, {output.size(choice.bound * item)}"),
        ],
    )
    output.print_line()
    best = choice.best
    rows = []
    for p in choice.predictions:
        if p.words is None or p.ratio is None:
            rows.append([p.algorithm.title, "-", "-", "-", "-", f"needs {p.least_memory:,} words"])
            continue
        mark = "<- fewest" if p is best else ""
        size = output.size(p.words * item)
        rows.append([p.algorithm.title, str(p.tiles), f"{p.words:,}", size, f"{p.ratio:.2f}", mark])
    output.print_table(_HEADINGS, rows, left=2)
    output.print_line()
    at = facts["crossover_words"]
    if at is None:
        output.print_line("crossover: none up to 4 d^2 words; square tiling stays ahead of FlashAttention's order")
    else:
        output.print_line(
            f"crossover: from {at:,} words on ({at / d**2:.2f} d^2) FlashAttention-2's order moves the fewest"
        )
