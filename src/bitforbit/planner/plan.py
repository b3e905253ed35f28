"""The plan: what each setting takes on the fullest GPU, whether it fits, how long a context fits, and what would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bitforbit.errors import KvSpecError, PlanError, UsageError
from bitforbit.planner.cache import KvSetting
from bitforbit.planner.gpus import Gpu
from bitforbit.planner.memory import Load, Memory, Split, Stage
from bitforbit.planner.offload import Elsewhere, Offload, Streaming
from bitforbit.planner.shapes import Shape
from bitforbit.planner.speed import tokens_per_second
from bitforbit.planner.weights import Storage, UnknownSizeError

RESERVE = 900_000_000
"""Bytes of each GPU that are kept free: driver, context, kernels, what allocators lose.

Between the two values that the out-of-memory points of DFloat11's Figure 5 imply (docs/guide/plan.md). On a CPU nothing
is kept free unless asked for."""

LONGEST = 1 << 30
"""Tokens beyond which nobody asks."""

DISK = 3.5e9
"""Bytes per second of a disk of which nothing is known: what the data sheets of many NVMe drives say (PCIe 3.0)."""

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
    elsewhere: Elsewhere | None = None
    """What there is beside GPUs; None: as much host memory as it takes, PCIe as the data sheet says, a usual disk."""

    @property
    def beside(self) -> Elsewhere:
        """The same, never None."""
        return Elsewhere(link=self.gpu.link, disk=DISK) if self.elsewhere is None else self.elsewhere

    @property
    def capacity(self) -> int:
        """Bytes of a GPU that may be used."""
        reserve = (RESERVE if self.gpu.tiles else 0) if self.reserve is None else self.reserve
        if not 0 <= reserve < self.gpu.memory:
            raise PlanError(f"--reserve: expected less than {self.gpu.memory} bytes ({self.gpu.name}), got {reserve}")
        return self.gpu.memory - reserve

    def bits_of(self, method: str) -> float | None:
        """Bits per weight that were asked for, or that a checkpoint has, in place of those known here."""
        if method == "bf16":
            return None
        return self.shape.df11_bits if self.bits is None and method == "df11" else self.bits


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
    """``offload``: settings that do not fit, with blocks elsewhere. ``advice``: what to change, nearest first, if
    nothing fits; empty if something does.
    """

    request: Request
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    advice: tuple[str, ...]
    offload: tuple[OffloadRow, ...] = ()


@dataclass(frozen=True)
class OffloadRow:
    """``over_bf16``: predicted speed over that of the uncompressed model with the same cache, None if unknown."""

    offload: Offload
    over_bf16: float | None


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
    advice = _advice(request, rows, offload)
    return Plan(request, tuple(rows), tuple(dict.fromkeys(skipped)), tuple(advice), tuple(offload))


def streaming_of(request: Request, method: str, kv: KvSetting, context: int) -> Streaming:
    """The model under one setting, as far as it is streamed. Raises KvSpecError and UnknownSizeError."""
    storage = Storage(method, request.shape.dimensions.dtype, request.gpu.tiles, request.bits_of(method))
    load = Load(context, request.batch, request.call)
    return Streaming(request.shape, request.split.pipeline, storage, kv, load, request.gpu)


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


def stages_of(request: Request, method: str, kv: KvSetting) -> list[Stage]:
    """The groups of GPUs under one setting. Raises KvSpecError."""
    storage = Storage(method, request.shape.dimensions.dtype, request.gpu.tiles, request.bits_of(method))
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


def _advice(request: Request, rows: Sequence[Row], offload: Sequence[OffloadRow]) -> list[str]:
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
    advice += _offload_advice(request, rows, offload)
    for count in range(request.split.gpus + 1, _MOST_GPUS + 1):
        split = split_over(request.shape, count, tensor=request.split.tensor > 1)
        if split is not None and _some_fit(replace(request, split=split)):
            advice.append(f"{count} such GPUs fit ({describe(split)})")
            break
    if not advice:
        advice.append(f"no number of such GPUs up to {_MOST_GPUS} fits; take larger ones, or a smaller model")
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

        tokens = _largest(fits)
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
