"""The plan: what each setting takes on the fullest GPU, whether it fits, how long a context fits, and what would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bitforbit.errors import KvSpecError, PlanError, UsageError
from bitforbit.planner.cache import KvSetting
from bitforbit.planner.gpus import Gpu
from bitforbit.planner.memory import Load, Memory, Split, Stage
from bitforbit.planner.shapes import Shape
from bitforbit.planner.speed import tokens_per_second
from bitforbit.planner.weights import Storage, UnknownSizeError

RESERVE = 900_000_000
"""Bytes of each GPU that are kept free: driver, context, kernels, what allocators lose.

Between the two values that the out-of-memory points of DFloat11's Figure 5 imply (docs/guide/plan.md). On a CPU nothing
is kept free unless asked for."""

LONGEST = 1 << 30
"""Tokens beyond which nobody asks."""

ONE = Split()
_MOST_GPUS = 64


@dataclass(frozen=True)
class Request:
    """What to plan. ``context`` None: as long as fits, up to the model's limit. ``reserve`` in bytes per GPU."""

    shape: Shape
    gpu: Gpu
    split: Split = ONE
    context: int | None = None
    batch: int = 1
    call: int = 2048
    methods: tuple[str, ...] = ("bf16", "exact", "fused")
    caches: tuple[KvSetting, ...] = (KvSetting("16"),)
    bits: float | None = None
    reserve: int | None = None

    @property
    def capacity(self) -> int:
        """Bytes of a GPU that may be used."""
        reserve = (RESERVE if self.gpu.tiles else 0) if self.reserve is None else self.reserve
        if not 0 <= reserve < self.gpu.memory:
            raise PlanError(f"--reserve: expected less than {self.gpu.memory} bytes ({self.gpu.name}), got {reserve}")
        return self.gpu.memory - reserve


@dataclass(frozen=True)
class Row:
    """One setting. ``longest``: tokens that fit in memory, 0 if none do; ``speed``: tokens per second, an estimate."""

    method: str
    kv: str
    lossy: bool
    context: int
    memory: Memory
    fits: bool
    longest: int
    speed: float | None
    compressed_bytes: int
    weights_source: str


@dataclass(frozen=True)
class Plan:
    """``advice``: what to change, nearest first, if nothing fits; empty if something does."""

    request: Request
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    advice: tuple[str, ...]


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
    return Plan(request, tuple(rows), tuple(dict.fromkeys(skipped)), tuple(_advice(request, rows)))


def stages_of(request: Request, method: str, kv: KvSetting) -> list[Stage]:
    """The groups of GPUs under one setting. Raises KvSpecError."""
    dtype = request.shape.dimensions.dtype
    bits = request.shape.df11_bits if request.bits is None and method == "df11" else request.bits
    storage = Storage(method, dtype, request.gpu.tiles, bits if method != "bf16" else None)
    return [Stage(request.shape, request.split, i, storage, kv) for i in range(request.split.pipeline)]


def peak(stages: Sequence[Stage], load: Load) -> Memory:
    """Memory of the fullest GPU."""
    return max((stage.memory(load) for stage in stages), key=lambda memory: memory.total)


def longest_context(stages: Sequence[Stage], load: Load, capacity: int) -> int:
    """Most tokens that fit; 0 if not even one does."""
    return _largest(lambda tokens: peak(stages, replace(load, context=tokens)).total <= capacity)


def _largest(fits: Callable[[int], bool]) -> int:
    low, high = 0, 1
    while high < LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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


def _advice(request: Request, rows: Sequence[Row]) -> list[str]:
    """The nearest plans that fit, if none of these does."""
    if any(row.fits for row in rows):
        return []
    advice = []
    best = max(rows, key=lambda row: (row.longest, not row.lossy))
    if best.longest:
        advice.append(f"{best.longest:,} tokens fit with {_name(best)}")
    if request.batch > 1:
        batch = _largest(lambda n: n < request.batch and _some_fit(replace(request, batch=n)))
        if batch:
            advice.append(f"a batch of {batch} fits")
    other = _other_cache(request, rows)
    if other:
        advice.append(other)
    for count in range(request.split.gpus + 1, _MOST_GPUS + 1):
        split = split_over(request.shape, count, tensor=request.split.tensor > 1)
        if split is not None and _some_fit(replace(request, split=split)):
            advice.append(f"{count} such GPUs fit ({describe(split)})")
            break
    if not advice:
        advice.append(f"no number of such GPUs up to {_MOST_GPUS} fits; take larger ones, or a smaller model")
    return advice


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
