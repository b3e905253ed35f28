"""Which kernel, and which launch, for how many tokens on which device. Nothing here changes a result's bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import ClassVar

from bitforbit.cuda.fused import tuned
from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.kernel import U32, DeviceProperties, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.tiles.kinds import BF16, F16, KINDS, Kind
from bitforbit.cuda.tiles.layout import SIZE_LIMIT, TILE_COLS, TILE_ROWS, TILE_WEIGHTS
from bitforbit.errors import UsageError

MAX_TOKENS = 64
MMA_TOKENS = 8
MOST_SHARED_BYTES = 227 << 10
"""Of a block, on any GPU."""
LIST_BYTES = 512
"""Of a chunk's escapes in shared memory; longer lists are read from device memory."""
SWIZZLE_BYTES = 1024
"""Of shared memory, at most, before the address that is a multiple of it."""
TABLE_BYTES = 128
"""Of a block's table of escapes' exponents."""
PARAMETERS = (Pointer, U32, Pointer, Pointer, U32, U32, U32, U32, U32, Pointer, Pointer)
ARRIVED_BYTES = 1 << 16
"""Of a workspace: numbers of blocks that have arrived, one per unit; all zero between launches."""


@dataclass(frozen=True)
class Variant:
    """A binary of the kernel."""

    tokens: int
    """As many as it has room for."""
    stripes: int
    """Of a warp: each part of x that is loaded from shared memory meets so many times 16 rows."""
    warps: int
    """Of a block."""
    stages: int
    """Tiles of each stripe in shared memory or on their way, and tiles' columns of x in one of its two chunks."""
    blocks: int
    """Of a multiprocessor, for which the compiler leaves registers."""
    bulk: int = 0
    """1: tiles come by bulk copies on architectures that have them (sm_90 and later), 0: by cp.async."""

    instruction: ClassVar[str] = "mma.m16n8k16"
    """Of the order of summation."""
    capability: ClassVar[tuple[int, int] | None] = None
    """The only compute capability that it runs on, if it does not run on all."""

    def kernel(self, kind: Kind = BF16) -> Kernel:
        """Its entry point for a kind of weights."""
        defines = tuple((f"BITFORBIT_{field.name.upper()}", str(getattr(self, field.name))) for field in fields(self))
        return Kernel("fused_linear", "fused_linear.cu", PARAMETERS, defines + kind.defines)

    @property
    def unit_rows(self) -> int:
        """Rows of a block."""
        return self.warps * self.stripes * TILE_ROWS

    def shared_bytes(self, kind: Kind = BF16) -> int:
        """Of a block."""
        chunk = 2 * self.tokens * (self.stages * TILE_COLS + 8)
        warp = self.stripes * (self.stages * kind.tile_bytes + 2 * TILE_WEIGHTS + 2 * LIST_BYTES) + 8 * self.stages
        return 2 * chunk + self.warps * warp


@dataclass(frozen=True)
class HalfSteps(Variant):
    """A binary of the same kernel whose matrix instruction takes half as many columns."""

    instruction: ClassVar[str] = "mma.m16n8k8"

    def kernel(self, kind: Kind = BF16) -> Kernel:
        """Its entry point for a kind of weights."""
        whole = super().kernel(kind)
        return replace(whole, defines=(*whole.defines, ("BITFORBIT_K_STEP", "8")))


@dataclass(frozen=True)
class Hopper(Variant):
    """A binary for sm_90a alone, by its matrix instructions, which may sum in another way than those of the others.

    ``warps`` is a multiple of 8, ``stages`` of 2, ``stripes`` and ``bulk`` are 1.
    """

    chunk: int = 4
    """Tiles' columns of x in one of its two chunks, a multiple of 4 and of ``stages``."""

    instruction: ClassVar[str] = "wgmma.m64nNk16"
    capability: ClassVar[tuple[int, int] | None] = (9, 0)

    def kernel(self, kind: Kind = BF16) -> Kernel:
        """Its entry point for a kind of weights."""
        names = ("tokens", "warps", "stages", "blocks", "chunk")
        defines = tuple((f"BITFORBIT_{name.upper()}", str(getattr(self, name))) for name in names)
        return Kernel("fused_hopper", "fused_hopper.cu", PARAMETERS, defines + kind.defines)

    def shared_bytes(self, kind: Kind = BF16) -> int:
        """Of a block."""
        chunk = 2 * self.tokens * self.chunk * TILE_COLS
        ring = self.stages // 2 * (2 * kind.tile_bytes + 16)  # two tiles and their barrier
        warp = ring + 2 * TILE_WEIGHTS + 2 * self.chunk * (LIST_BYTES // 4 + 8)
        return SWIZZLE_BYTES + 2 * chunk + TABLE_BYTES + self.warps * warp


VARIANTS = (
    Variant(8, 1, 8, 4, 2),
    Variant(16, 1, 8, 4, 2),
    Variant(32, 1, 8, 2, 2),
    Variant(32, 2, 4, 4, 2),
    Variant(64, 2, 4, 2, 2),
)
"""For each number of tokens, first the one for GPUs with little shared memory."""
BULK = tuple(replace(variant, bulk=1) for variant in VARIANTS if variant.tokens in (8, 64))
"""To be compared with the others on a GPU; chosen only where a table of measurements says so."""
HALF_STEPS = tuple(HalfSteps(**vars(variant)) for variant in VARIANTS)
"""For orders that have been found to be a library's (:mod:`bitforbit.ops.gpu.order`)."""
HOPPER = (
    Hopper(8, 1, 8, 4, 2, 1, 8),
    Hopper(16, 1, 8, 4, 2, 1, 8),
    Hopper(32, 1, 8, 4, 2, 1, 4),
    Hopper(32, 1, 16, 4, 1, 1, 8),
    Hopper(64, 1, 16, 4, 1, 1, 4),
)
"""So are these, and to be compared with the others, on GPUs of compute capability 9.0."""
ALL = VARIANTS + BULK + HALF_STEPS + HOPPER
_PLAIN_PARAMETERS = (Pointer,) * 4 + (U32,) * 7
PLAIN = {kind.outputs: Kernel("fused_plain", "fused_plain.cu", _PLAIN_PARAMETERS, kind.defines) for kind in (BF16, F16)}
"""By what weights and activations are."""


def has(variant: Variant, kind: Kind) -> bool:
    """Whether there is a binary for a kind of weights.

    Half steps are for libraries' orders, which are proven for BF16 alone; some blocks would be too large for any GPU.
    """
    return kind == BF16 or (variant not in HALF_STEPS and variant.shared_bytes(kind) <= MOST_SHARED_BYTES)


KERNELS = (
    *(variant.kernel(kind) for kind in KINDS for variant in ALL if has(variant, kind)),
    *PLAIN.values(),
)


@dataclass(frozen=True)
class Plan:
    """A launch."""

    variant: Variant
    kernel: Kernel
    config: LaunchConfig
    workspace_bytes: int
    """ARRIVED_BYTES, and after them FP32 sums."""


def choose_variant(
    tokens: int, properties: DeviceProperties, instruction: str = Variant.instruction, kind: Kind = BF16
) -> Variant:
    """The variant for so many tokens: the last of those of an instruction that fit into the device's shared memory."""
    return [variant for variant in variants(tokens, properties, instruction, kind) if variant not in BULK][-1]


def variants(
    tokens: int, properties: DeviceProperties, instruction: str = Variant.instruction, kind: Kind = BF16
) -> tuple[Variant, ...]:
    """All of an instruction that are made for so many tokens and run on the device, at least one. Raises UsageError."""
    if not 1 <= tokens <= MAX_TOKENS:
        raise UsageError(f"expected 1 to {MAX_TOKENS} tokens, got {tokens}; decode the matrix for more")
    known = [v for v in _of(properties) if v.instruction == instruction and v.tokens >= tokens and has(v, kind)]
    if not known:
        raise UsageError(f"expected an instruction of {properties.name} for {kind.name}, got {instruction}")
    room = min(variant.tokens for variant in known)
    fits = [v for v in known if v.tokens == room and v.shared_bytes(kind) <= properties.shared_bytes_per_block]
    if not fits:
        raise UsageError(f"expected a GPU with more than {properties.shared_bytes_per_block} bytes of shared memory")
    return tuple(fits)


def tuned_variant(
    rows: tuple[int, ...], order: Order, tokens: int, properties: DeviceProperties, kind: Kind = BF16
) -> Variant | None:
    """The one that was measured to be the fastest for a shape; None if none of this version's was, for such orders."""
    fits = variants(tokens, properties, order.instruction, kind)
    fields = tuned.find(rows, order.cols, properties).variants.get(fits[0].tokens)
    return next((variant for variant in fits if asdict(variant) == fields), None)


def instructions(properties: DeviceProperties) -> tuple[str, ...]:
    """The matrix instructions of a device that kernels have."""
    return tuple(dict.fromkeys(variant.instruction for variant in _of(properties)))


def _of(properties: DeviceProperties) -> list[Variant]:
    """The variants that a device has the instructions for; copies in bulk come with compute capability 9.0."""
    capability = properties.compute_capability
    return [v for v in ALL if v.capability in (None, capability) and (not v.bulk or capability >= (9, 0))]


@lru_cache(maxsize=4096)
def plan(
    rows: tuple[int, ...], order: Order, tokens: int, properties: DeviceProperties, variant: Variant | None = None,
    kind: Kind = BF16,
) -> Plan:  # fmt: skip
    """The launch for matrices of so many rows each that share x [tokens, order.cols]. Raises UsageError."""
    chosen = variant or tuned_variant(rows, order, tokens, properties, kind)
    chosen = chosen or choose_variant(tokens, properties, order.instruction, kind)
    if not has(chosen, kind):
        raise UsageError(f"expected a variant that there is for {kind.name}, got {chosen}")
    if tokens > chosen.tokens:
        raise UsageError(f"expected at most {chosen.tokens} tokens for {chosen}, got {tokens}")
    if chosen.capability not in (None, properties.compute_capability):
        raise UsageError(f"expected a GPU of compute capability 9.0 for {chosen}, got {properties.compute_capability}")
    units = sum(-(-count // chosen.unit_rows) for count in rows)
    blocks = units * order.splits
    if max(blocks, sum(rows)) >= SIZE_LIMIT or (order.splits > 1 and 4 * units > ARRIVED_BYTES):
        raise UsageError(f"expected fewer rows in one launch, got {sum(rows)}: multiply by fewer matrices at once")
    sums = 4 * blocks * chosen.unit_rows * chosen.tokens if order.splits > 1 else 0
    config = LaunchConfig.linear(blocks, 32 * chosen.warps, chosen.shared_bytes(kind))
    return Plan(chosen, chosen.kernel(kind), config, ARRIVED_BYTES + sums)


@lru_cache(maxsize=4096)
def workspace_bytes(rows: tuple[int, ...], order: Order, properties: DeviceProperties) -> int:
    """Size of a workspace for up to MAX_TOKENS tokens."""
    variants = [v for v in ALL if v.capability in (None, properties.compute_capability)]
    return max(plan(rows, order, variant.tokens, properties, variant).workspace_bytes for variant in variants)
