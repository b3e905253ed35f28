"""The plan: what each setting takes on the fullest GPU, whether it fits, how long a context fits, and what would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bitforbit.errors import KvSpecError, UsageError
from bitforbit.planner.advice import advise
from bitforbit.planner.cache import KvSetting
from bitforbit.planner.memory import Load, Split
from bitforbit.planner.offload import Offload
from bitforbit.planner.request import OffloadRow, Request, Row, longest_context, peak, stages_of, streaming_of
from bitforbit.planner.speed import tokens_per_second
from bitforbit.planner.weights import UnknownSizeError


@dataclass(frozen=True)
class Plan:
    """``offload``: settings that do not fit, with blocks elsewhere. ``advice``: what to change, nearest first, if
    nothing fits; empty if something does.
    """

    request: Request
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    advice: tuple[str, ...]
    offload: tuple[OffloadRow, ...] = ()


def make_plan(request: Request) -> Plan:
    """All settings of a request that the model can have; the others are in ``skipped``.

    Raises PlanError, and KvSpecError if none is left.
    """
    shape = request.shape
    request.split.check(shape)
    rows: list[Row] = []
    skipped: list[str] = []
    error: UsageError | None = None
    for method in request.methods:
        for kv in request.caches:
            try:
                rows.append(_row(request, method, kv))
            except (KvSpecError, UnknownSizeError) as e:
                error = e
                skipped.append(f"{f'KV {kv.name}' if isinstance(e, KvSpecError) else method}: {e}")
    if error is not None and not rows:
        raise error
    offload = _offload_rows(request, rows)
    advice = advise(request, rows, offload)
    return Plan(request, tuple(rows), tuple(dict.fromkeys(skipped)), tuple(advice), tuple(offload))


def _offload_rows(request: Request, rows: Sequence[Row]) -> list[OffloadRow]:
    """Of the settings that do not fit those that run with blocks elsewhere."""
    found: list[OffloadRow] = []
    if request.split.tensor > 1:
        return found
    caches = {kv.name: kv for kv in request.caches}

    def plan(method: str, kv: str, context: int) -> Offload | None:
        streaming = streaming_of(request, method, caches[kv], context)
        return streaming.plan(request.capacity, request.beside)

    for row in rows:
        if row.fits or row.method == "df11":
            continue
        made = plan(row.method, row.kv, row.context)
        if made is None:
            continue
        plain = made if row.method == "bf16" else plan("bf16", row.kv, row.context)
        theirs = None if plain is None else plain.speed
        found.append(OffloadRow(made, made.speed / theirs if made.speed and theirs else None))
    return found


def _row(request: Request, method: str, kv: KvSetting) -> Row:
    stages, limit = stages_of(request, method, kv), request.shape.dimensions.limit
    longest = longest_context(stages, Load(1, request.batch, request.call), request.capacity)
    context = request.context or max(1, min(longest, limit or longest))
    load = Load(context, request.batch, request.call)
    memory = peak(stages, load)
    return Row(
        method=method,
        kv=kv.name,
        lossy=kv.spec is not None,
        context=context,
        memory=memory,
        fits=memory.total <= request.capacity,
        longest=longest,
        speed=tokens_per_second(stages, load, request.gpu),
        compressed_bytes=_all_weights(request, method),
        weights_source=stages[0].storage.source if method != "bf16" else "",
    )


def _all_weights(request: Request, method: str) -> int:
    """Bytes of the weights on all GPUs together, each once."""
    whole = replace(request, split=Split())
    return stages_of(whole, method, KvSetting("16"))[0].weights
