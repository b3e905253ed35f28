"""How many GPUs ``bitforbit serve`` tells vLLM to use, where nobody said so: the fewest on which the model fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitforbit.cli import output
from bitforbit.errors import BitforbitError, GpuUnavailableError, PlanError

_SAID = (
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--data-parallel-size",
    "-dp",
    "--distributed-executor-backend",
    "--nnodes",
    "-n",
    "--config",
    "--headless",
)
"""Options of vLLM after which the number of GPUs is the user's."""

_UTILIZATION = 0.92
"""Part of a GPU's memory that vLLM 0.32 takes by default."""


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option among arguments, as ``--name value`` or ``--name=value``; the last one, "" for a flag.

    vLLM takes ``_`` for ``-``.
    """
    found = None
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.startswith("-") and flag.replace("_", "-") == name:
            after = arguments[i + 1] if i + 1 < len(arguments) else ""
            found = value if equals else "" if after.startswith("-") else after
    return found


def memories() -> list[int]:
    """Bytes of each NVIDIA GPU that this process sees; none without a driver."""
    from bitforbit.cuda import driver

    try:
        started = driver.get()
        return [started.memory(i) for i in range(started.device_count())]
    except GpuUnavailableError:
        return []


def parallel(directory: Path, mode: str, arguments: Sequence[str], gpus: Sequence[int]) -> tuple[list[str], str | None]:
    """Options to add to vLLM's, and a line that says why, or that the model does not fit.

    ``gpus``: bytes of each. Nothing is added where one GPU is enough, where the user has said how many, or where the
    model's size is unknown.
    """
    if not gpus or any(option(arguments, name) is not None for name in _SAID):
        return [], None
    from bitforbit.planner import Gpu, Request, Row, Split, make_plan, read_shape

    memory = min(gpus)
    gpu = Gpu("GPU", memory)
    try:
        shape = read_shape(directory)
    except (BitforbitError, OSError):
        return [], None  # an estimate less; whoever loads the model says what is wrong with it
    context = _tokens(option(arguments, "--max-model-len"), shape.dimensions.limit)
    reserve = round(memory * (1 - _utilization(option(arguments, "--gpu-memory-utilization"))))
    rows: dict[int, Row] = {}
    for count in range(1, len(gpus) + 1):
        request = Request(shape, gpu, Split(count), context, methods=(mode,), reserve=reserve)
        try:
            rows[count] = make_plan(request).rows[0]
        except PlanError:  # the model's heads cannot be shared by so many
            continue
        if rows[count].fits:
            break
    if not rows:
        return [], None
    most, row = next(reversed(rows.items()))
    if row.fits and most == 1:
        return [], None
    needed = f"{row.context:,} tokens take about {output.size(rows[min(rows)].memory.total)} on one GPU"
    usable = f"of which {output.size(request.capacity)} are usable"
    if row.fits:
        why = f"{needed}, {usable}: --tensor-parallel-size {most} added (an estimate; say it yourself to choose)"
        return ["--tensor-parallel-size", str(most)], why
    advice = f"--max-model-len {row.longest} would fit" if row.longest else "the weights alone do not"
    return (
        ["--tensor-parallel-size", str(most)] if most > 1 else [],
        f"{needed}, {usable}, and {most} GPU{'s are' if most > 1 else ' is'} not enough by estimate; {advice} "
        "(see bitforbit plan)",
    )


def _tokens(text: str | None, limit: int | None) -> int:
    """vLLM's --max-model-len: a number, perhaps with k, m (1000) or K, M (1024); else what the model was made for."""
    factors = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}
    if text and text[-1] in factors:
        number, factor = text[:-1], factors[text[-1]]
    else:
        number, factor = text or "", 1
    if number.isdecimal() and int(number):
        return int(number) * factor
    # "auto" and -1 stand for as much as fits.
    return (limit or 8192) if text is None else 1


def _utilization(text: str | None) -> float:
    try:
        value = float(text or _UTILIZATION)
    except ValueError:
        return _UTILIZATION
    return value if 0 < value <= 1 else _UTILIZATION
