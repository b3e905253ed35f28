"""The nearest plans that fit, where none that was asked for does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bitforbit.errors import KvSpecError, PlanError
from bitforbit.planner.cache import KvSetting
from bitforbit.planner.memory import Load, Split
from bitforbit.planner.request import OffloadRow, Request, Row, largest, peak, stages_of, streaming_of
from bitforbit.planner.shapes import Shape
from bitforbit.planner.weights import UnknownSizeError

_MOST_GPUS = 64


def advise(request: Request, rows: Sequence[Row], offload: Sequence[OffloadRow]) -> list[str]:
    """What to change, nearest first, if none of these fits; nothing if one does."""
    if any(row.fits for row in rows):
        return []
    advice = []
    best = max(rows, key=lambda row: (row.longest, not row.lossy))
    if best.longest:
        advice.append(f"{best.longest:,} tokens fit with {_name(best)}")
    if request.batch > 1:
        batch = largest(lambda n: n < request.batch and _some_fit(replace(request, batch=n)))
        if batch:
            advice.append(f"a batch of {batch} fits")
    other = _other_cache(request, rows)
    if other:
        advice.append(other)
    advice += _offload_advice(request, rows, offload)
    most = _MOST_GPUS if request.gpu.tiles else 1  # a model runs on one CPU
    for count in range(request.split.gpus + 1, most + 1):
        split = split_over(request.shape, count, tensor=request.split.tensor > 1)
        if split is not None and _some_fit(replace(request, split=split)):
            advice.append(f"{count} such GPUs fit ({describe(split)})")
            break
    if not advice:
        such = f"no number of such GPUs up to {most} fits; take larger ones" if most > 1 else "take more memory"
        advice.append(f"{such}, or a smaller model")
    return advice


def _offload_advice(request: Request, rows: Sequence[Row], offload: Sequence[OffloadRow]) -> list[str]:
    """The fastest way with blocks elsewhere; where there is none, how many tokens would have one."""
    if offload:
        best = max((row.offload for row in offload), key=lambda each: (each.speed or 0, sum(each.resident)))
        where = "on GPUs" if request.gpu.tiles else "in memory"
        return [f"offload fits: {best.method}, KV {best.kv}, {sum(best.resident)} of {best.blocks} blocks {where}"]
    best_tokens, best_row = 0, None
    for row in rows if request.split.tensor == 1 else ():
        if row.method == "df11":
            continue
        kv = next(each for each in request.caches if each.name == row.kv)

        def fits(tokens: int, method: str = row.method, kv: KvSetting = kv) -> bool:
            made = streaming_of(request, method, kv, tokens).plan(request.capacity, request.beside)
            return tokens < row.context and made is not None  # noqa: B023  (called in this round only)

        tokens = largest(fits)
        if tokens > best_tokens:
            best_tokens, best_row = tokens, row
    return [f"{best_tokens:,} tokens fit with offload and {_name(best_row)}"] if best_row is not None else []


def _other_cache(request: Request, rows: Sequence[Row]) -> str:
    from bitforbit.kv.spec import KiviSpec

    asked = {row.kv for row in rows}
    for name, k_bits, v_bits in (("8", 8, 8), ("4", 4, 4), ("k4v2", 4, 2), ("2", 2, 2)):
        kv = KvSetting(name, KiviSpec(k_bits, v_bits, sink=4))
        if name not in asked and _some_fit(replace(request, caches=(kv,))):
            return f"--kv {name} fits (lossy)"
    return ""


def _some_fit(request: Request) -> bool:
    """Whether any setting of a request fits."""
    load = Load(request.context or 1, request.batch, request.call)

    def fits(method: str, kv: KvSetting) -> bool:
        try:
            return peak(stages_of(request, method, kv), load).total <= request.capacity
        except (KvSpecError, UnknownSizeError):
            return False

    return any(fits(method, kv) for method in request.methods for kv in request.caches)


def split_over(shape: Shape, gpus: int, *, tensor: bool) -> Split | None:
    """So many GPUs as one group, or layer by layer; None where the model cannot be cut so."""
    split = Split(gpus, 1) if tensor else Split(1, gpus)
    try:
        split.check(shape)
    except PlanError:
        return None
    return split


def describe(split: Split) -> str:
    """Such as ``"pipeline 4"``."""
    parts = [("tensor", split.tensor), ("pipeline", split.pipeline)]
    return " x ".join(f"{name} {count}" for name, count in parts if count > 1) or "one GPU"


def _name(row: Row) -> str:
    return f"{row.method}, KV {row.kv}" + (" (lossy)" if row.lossy else "")
