"""Models that do not fit: which blocks stay, what the rest takes elsewhere, and how fast blocks can follow each other.

As :mod:`bitforbit.offload` runs them. Blocks are the layers, and the head if it is not the embedding. GPUs are filled
in the order of use; what is left at the end runs on the first GPU, streamed through slots there, for as many of the
largest of these blocks as there are at a time: while one runs, the next ones are on their way. They come from host
memory as long as there is room, in the layout that they run from, the others from the files. Where slots would take
more than half of what a GPU has for weights, fewer blocks are fetched ahead.

The uncompressed model is planned as accelerate runs it: a block's weights are fetched when it is its turn, into room
for the largest one.

Speeds are predictions: bytes over stated bandwidths, arithmetic left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from bitforbit.iomodel.traffic import predict_seconds
from bitforbit.planner.cache import KvSetting
from bitforbit.planner.gpus import Gpu
from bitforbit.planner.memory import Load, Memory, Split, Stage
from bitforbit.planner.shapes import Layer, Matrix, Shape
from bitforbit.planner.speed import step_traffic
from bitforbit.planner.weights import Storage, UnknownSizeError

AHEAD = 2
"""Blocks on their way while one runs: the default of :mod:`bitforbit.offload`."""
_ALIKE = 1.125
"""Ratio of the sizes of blocks that share slots there."""
_INNER = Split(pipeline=3)
"""Of which the group in the middle has neither embedding nor head."""
_STEPS = 3
"""Steps that are gone through until each takes as long as the one before."""


@dataclass(frozen=True)
class Elsewhere:
    """What there is beside GPUs: ``host`` bytes of memory, None: as many as are needed; bandwidths in bytes/s.

    ``link``: from host memory to a GPU, ``disk``: from the files to host memory; None if unknown.
    """

    host: int | None = None
    link: float | None = None
    disk: float | None = None


@dataclass(frozen=True)
class Offload:
    """How a setting that does not fit runs all the same.

    ``resident``: blocks on each GPU; ``streamed``: blocks that are not, which pass through ``slots`` slots of
    ``slot_bytes`` together. ``memory``: of the fullest GPU, slots included in its weights. ``host_bytes`` and
    ``disk_bytes``: of streamed blocks, where they are kept; ``disk_blocks`` of them are in the files. ``speed``:
    predicted tokens per second, None where a bandwidth is unknown.
    """

    method: str
    kv: str
    context: int
    resident: tuple[int, ...]
    streamed: int
    slots: int
    slot_bytes: int
    memory: Memory
    host_bytes: int
    disk_bytes: int
    disk_blocks: int
    speed: float | None

    @property
    def blocks(self) -> int:
        """All of them."""
        return sum(self.resident) + self.streamed


@dataclass(frozen=True)
class _Block:
    """``stored``: bytes as it lies in the files; ``kv``: its keys and values; ``seconds``: least time to compute."""

    nbytes: int
    stored: int
    kv: int
    seconds: float


class Streaming:
    """One setting of a model on ``gpus`` GPUs alike."""

    def __init__(self, shape: Shape, gpus: int, storage: Storage, kv: KvSetting, load: Load, gpu: Gpu) -> None:
        """Raises KvSpecError and UnknownSizeError."""
        self.gpus, self.storage, self.load, self.gpu = gpus, storage, load, gpu
        self.whole = Stage(shape, Split(), 0, storage, kv)
        self.kv_name = kv.name
        logits = self._seconds(Stage(shape, Split(), 0, storage, kv, layers=()))
        self._begin = storage.nbytes(shape.embedding) + sum(map(storage.nbytes, shape.other))
        self._begin += shape.vectors * storage.item
        made: dict[Layer, _Block] = {}
        for layer in shape.layers:
            if layer not in made:
                made[layer] = self._layer(layer, kv)
        self.blocks = [made[layer] for layer in shape.layers]
        if shape.head is not None:
            self.blocks.append(_Block(storage.nbytes(shape.head), self._stored(shape.head), 0, logits))
        self._tied_seconds = logits if shape.head is None else 0.0

    @cached_property
    def _files(self) -> Storage:
        """How the files keep what the GPU has as tiles."""
        return Storage(self.storage.method, self.storage.dtype, tiles=False, bits=self.storage.bits)

    def _stored(self, matrix: Matrix) -> int:
        """Bytes in the files; where only the weights would tell, those on the GPU."""
        try:
            return self._files.nbytes(matrix)
        except UnknownSizeError:
            return self.storage.nbytes(matrix)

    def _layer(self, layer: Layer, kv: KvSetting) -> _Block:
        stage = Stage(self.whole.shape, _INNER, 1, self.storage, kv, layers=(layer,))
        vectors = layer.vectors * self.storage.item
        stored = sum(map(self._stored, layer.matrices)) + vectors
        nbytes = sum(map(self.storage.nbytes, layer.matrices)) + vectors
        return _Block(nbytes, stored, stage.kv(self.load), self._seconds(stage))

    def _seconds(self, stage: Stage) -> float:
        """Of memory traffic; 0 if the bandwidth is unknown, as it is of CPUs: fetching takes far longer."""
        if self.gpu.bandwidth is None:
            return 0.0
        return predict_seconds(step_traffic(stage, self.load), self.gpu.machine)

    def slots(self, capacity: int) -> int:
        """Room for blocks that do not stay: for the one that runs, and those on their way."""
        ahead = AHEAD if self.storage.compressed else 0
        while ahead and 2 * _largest(self.blocks, ahead + 1) > capacity - self._passing:
            ahead -= 1
        return ahead + 1

    def plan(self, capacity: int, elsewhere: Elsewhere) -> Offload | None:
        """With as many resident blocks as ``capacity`` bytes of each GPU allow; None if there is no room for any."""
        slots = self.slots(capacity)
        own = [0, *accumulate(block.nbytes + block.kv for block in self.blocks)]
        most = bisect_right(own, capacity - self._begin - self._passing) - 1
        # Without resident blocks the first GPU holds least: if that is too much, all is.
        if most < 0 or self._with(0, slots, capacity, elsewhere) is None:
            return None
        found = (self._with(first, slots, capacity, elsewhere) for first in range(most, -1, -1))
        return next(plan for plan in found if plan is not None)

    def _with(self, first: int, slots: int, capacity: int, elsewhere: Elsewhere) -> Offload | None:
        """With so many blocks on the first GPU; None if they are too many."""
        resident = self._fill(first, capacity)
        memory = max(self._memories(resident, slots), key=lambda each: each.total)
        return self._offload(resident, slots, memory, elsewhere) if memory.total <= capacity else None

    def _fill(self, first: int, capacity: int) -> list[int]:
        """Blocks of each GPU, if the first one has so many."""
        resident, begin = [first], first
        passing = self._passing
        for _ in range(self.gpus - 1):
            end, used = begin, passing
            while end < len(self.blocks) and used + self.blocks[end].nbytes + self.blocks[end].kv <= capacity:
                used += self.blocks[end].nbytes + self.blocks[end].kv
                end += 1
            resident.append(end - begin)
            begin = end
        return resident

    @cached_property
    def _passing(self) -> int:
        """Bytes beside weights and cache, taken to be the same on every GPU."""
        return self.whole.scratch(self.load) + self.whole.activations(self.load)

    def _memories(self, resident: Sequence[int], slots: int) -> list[Memory]:
        scratch, activations = self.whole.scratch(self.load), self.whole.activations(self.load)
        streamed = self.blocks[sum(resident) :]
        found, begin = [], 0
        for i, count in enumerate(resident):
            own = self.blocks[begin : begin + count]
            begin += count
            weights, kv = sum(block.nbytes for block in own), sum(block.kv for block in own)
            if i == 0:
                weights += self._begin + _largest(streamed, slots)
                kv += sum(block.kv for block in streamed)
            found.append(Memory(weights, scratch, kv, activations))
        return found

    def _offload(self, resident: Sequence[int], slots: int, memory: Memory, elsewhere: Elsewhere) -> Offload:
        streamed = self.blocks[sum(resident) :]
        on_cpu = not self.gpu.tiles
        room = 0 if on_cpu else elsewhere.host
        in_host, host_bytes = 0, 0
        for block in streamed:
            if room is not None and host_bytes + block.nbytes > room:
                break
            host_bytes += block.nbytes
            in_host += 1
        on_disk = streamed[in_host:]
        slots = min(slots, len(streamed))
        seconds = self._step_seconds(streamed, in_host, slots, elsewhere)
        return Offload(
            method=self.storage.method,
            kv=self.kv_name,
            context=self.load.context,
            resident=tuple(resident),
            streamed=len(streamed),
            slots=slots,
            slot_bytes=_largest(streamed, slots),
            memory=memory,
            host_bytes=host_bytes,
            disk_bytes=sum(block.stored for block in on_disk),
            disk_blocks=len(on_disk),
            speed=self.load.batch / seconds if seconds else None,
        )

    def _step_seconds(self, streamed: Sequence[_Block], in_host: int, slots: int, elsewhere: Elsewhere) -> float | None:
        """Of a step, once each takes as long as the one before."""
        fetches = []
        for i, block in enumerate(streamed):
            ways = [(block.nbytes, elsewhere.link)] if i < in_host else [(block.stored, elsewhere.disk)]
            if i >= in_host and self.gpu.tiles:
                ways.append((block.stored, elsewhere.link))
            if any(bandwidth is None for _, bandwidth in ways):
                return None
            parts = [nbytes / bandwidth for nbytes, bandwidth in ways if bandwidth is not None]
            # Files are read while blocks that have been read are copied. accelerate does one after the other.
            fetches.append(max(parts) if self.storage.compressed else sum(parts))
        stay = sum(block.seconds for block in self.blocks[: len(self.blocks) - len(streamed)]) + self._tied_seconds
        computing = [block.seconds for block in streamed]
        if not self.storage.compressed:
            return stay + sum(fetches) + sum(computing)
        return steady_seconds(stay, fetches, computing, slots)


def _largest(blocks: Sequence[_Block], count: int) -> int:
    """Bytes of slots for so many of them, the largest ones, each for all blocks of about its size."""
    sizes = sorted((block.nbytes for block in blocks), reverse=True)
    return int(sum(max(size for size in sizes if size <= _ALIKE * slot) for slot in sizes[:count]))


def steady_seconds(stay: float, fetches: Sequence[float], computing: Sequence[float], slots: int) -> float:
    """Time of a step in which blocks pass through ``slots`` slots, fetched one after the other, ahead of their turn.

    ``stay``: time of the resident blocks, which come first. A block is fetched once the block that had its slot has
    run, the first ones of a step while the step before ends.
    """
    count = len(fetches)
    link, now, before = 0.0, 0.0, 0.0
    ends: list[float] = []
    for _ in range(_STEPS):
        before = now
        now += stay
        for fetch, compute in zip(fetches, computing, strict=True):
            free = ends[len(ends) - slots] if len(ends) >= slots else 0.0
            link = max(link, free) + fetch
            now = max(now, link) + compute
            ends.append(now)
    return now - before if count else stay
