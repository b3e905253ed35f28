"""What is asked for, and the answer for one setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bitforbit.errors import PlanError
from bitforbit.planner.cache import KvSetting
from bitforbit.planner.gpus import Gpu
from bitforbit.planner.memory import Load, Memory, Split, Stage
from bitforbit.planner.offload import Elsewhere, Offload, Streaming
from bitforbit.planner.shapes import Shape
from bitforbit.planner.weights import Storage

RESERVE = 900_000_000
"""Bytes of each GPU that are kept free: driver, context, kernels, what allocators lose.

Between the two values that the out-of-memory points of DFloat11's Figure 5 imply (docs/guide/plan.md). On a CPU nothing
is kept free unless asked for."""

LONGEST = 1 << 30
"""Tokens beyond which nobody asks."""

DISK = 3.5e9
"""Bytes per second of a disk of which nothing is known: what the data sheets of many NVMe drives say (PCIe 3.0)."""

ONE = Split()


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
class OffloadRow:
    """``over_bf16``: predicted speed over that of the uncompressed model with the same cache, None if unknown."""

    offload: Offload
    over_bf16: float | None


def stages_of(request: Request, method: str, kv: KvSetting) -> list[Stage]:
    """The groups of GPUs under one setting. Raises KvSpecError."""
    storage = Storage(method, request.shape.dimensions.dtype, request.gpu.tiles, request.bits_of(method))
    return [Stage(request.shape, request.split, i, storage, kv) for i in range(request.split.pipeline)]


def peak(stages: Sequence[Stage], load: Load) -> Memory:
    """Memory of the fullest GPU."""
    return max((stage.memory(load) for stage in stages), key=lambda memory: memory.total)


def longest_context(stages: Sequence[Stage], load: Load, capacity: int) -> int:
    """Most tokens that fit; 0 if not even one does."""
    return largest(lambda tokens: peak(stages, replace(load, context=tokens)).total <= capacity)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number below LONGEST that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, 1
    while high < LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def streaming_of(request: Request, method: str, kv: KvSetting, context: int) -> Streaming:
    """The model under one setting, as far as it is streamed. Raises KvSpecError and UnknownSizeError."""
    storage = Storage(method, request.shape.dimensions.dtype, request.gpu.tiles, request.bits_of(method))
    load = Load(context, request.batch, request.call)
    return Streaming(request.shape, request.split.pipeline, storage, kv, load, request.gpu)
