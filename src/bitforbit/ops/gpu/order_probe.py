"""In which order does torch's BF16 linear sum on a GPU? Finds out by comparing bits with the orders that kernels have.

As on a CPU (:mod:`bitforbit.ops.probe`): where every product occurs twice with opposite signs, at random places,
outputs are nothing but rounding residue, and another order gives other bits nearly everywhere. First all candidates are
tried on a few rows of such inputs, by the kernel that reads plain weights. What agrees there has to agree in every
output of the whole matrix, from tiles, by the kernel that is to be used: on these inputs and on others, ordinary, of
all magnitudes, tiny, with NaN and infinity. NaNs are compared by their bits, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from bitforbit.cuda.fused import linear as kernels
from bitforbit.cuda.fused.order import MOST_TREE_SPLITS, PARTIALS, REDUCTIONS, Order
from bitforbit.cuda.fused.plan import instructions
from bitforbit.cuda.tiles import naive
from bitforbit.cuda.tiles.layout import PARTS, TILE_COLS, TileLayout
from bitforbit.ops import probe
from bitforbit.ops.gpu import queues
from bitforbit.ops.gpu.queues import TensorQueue, addresses
from bitforbit.ops.probe import Inputs, Linear

ALIGNMENT = 256
"""Boundary, in bytes, beyond which alignment is not told apart; torch's memory on a GPU is on a wider one."""

_CHUNK_BYTES = 1 << 18
_LEAST_ROWS, _SIEVE_ROWS = 16, 16
_TELLING = 0.2
"""Share of outputs that an order known to be another must change, or the inputs prove nothing."""
_LIKELY_SPLITS = (1, 2, 4, 8, 16, 3, 6, 5, 7, 12)
_MOST_SPLITS = 32
_UNITS = (1, 2, 4)
"""Libraries cut the columns in multiples of so many tiles: 64, 128, 256."""


@dataclass(frozen=True)
class Product:
    """What torch's choice of a kernel may depend on, beside the device and its settings."""

    rows: int
    cols: int
    tokens: int
    dims: int
    """Dimensions of x, 1 to 3."""
    x_alignment: int
    """Largest power of two, at most :data:`ALIGNMENT`, that divides the address of x."""
    bias_alignment: int
    """So for the bias; 0 if there is none."""

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added."""
        return self.bias_alignment > 0


def find_order(linear: Linear, device: torch.device, product: Product) -> Order | None:
    """The order in which ``linear`` sums on a device, or None if no kernel has it.

    ``linear(x, weight, bias)`` is called with whole matrices: at a time, there is one of ``[rows, cols]``, and outputs.
    On a CPU, kernels run in the emulation in force. Waits for the device. Raises UsageError without an emulation, and
    torch.OutOfMemoryError.
    """
    bench = _Bench(linear, device, product)
    rng = np.random.default_rng((product.rows, product.cols, product.tokens))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        case = bench.case(probe.cancelling, rng)
        if not _equal(bench.run(case), case.expected) or not bench.tells(case):
            return None
        for instruction in instructions(bench.queue.properties):
            found = _search(bench, rng, case, candidates(product.cols, instruction))
            if found is not None:
                return found
    return None


def _search(bench: _Bench, rng: np.random.Generator, case: _Case, orders: Iterable[Order]) -> Order | None:
    """The one of some orders that agrees with all inputs, which begin with a case."""
    left = [order for order in orders if bench.sieves(case, order)]
    if bench.product.has_bias:
        left = [replace(order, bias_rounded=rounded) for order in left for rounded in (False, True)]
    left = [order for order in left if bench.agrees(case, order)]
    for make in _KINDS:
        if left:
            case = bench.case(make, rng)
            left = [order for order in left if bench.agrees(case, order)]
    for _ in range(_MORE_ROUNDS):
        if len(left) > 1:
            case = bench.case(between_tiles, rng)
            left = [order for order in left if bench.agrees(case, order)]
    return left[0] if left else None


def candidates(cols: int, instruction: str) -> Iterator[Order]:
    """Orders to try, the likely ones first, none twice: a bias is not among what they differ in."""
    tiles = -(-cols // TILE_COLS)
    counts = dict.fromkeys((*_LIKELY_SPLITS, *range(1, _MOST_SPLITS + 1)))
    seen: set[tuple[object, ...]] = set()
    cuts: list[Order] = []
    for splits in (count for count in counts if count <= tiles):
        for order in _cuts(cols, tiles, splits):
            if order.ranges not in seen:
                seen.add(order.ranges)
                cuts.append(order)
    for partials in PARTIALS:
        for reduction in REDUCTIONS:
            for cut in cuts:
                if _is_distinct(cut.splits, reduction, partials):
                    yield replace(cut, instruction=instruction, partials=partials, reduction=reduction)


def within_tiles(rng: np.random.Generator, rows: int, cols: int, tokens: int, has_bias: bool) -> Inputs:
    """Every tile of columns cancels by itself, so that the sum of a split is all residue, too.

    What an instruction does shows even if the sums of splits are rounded to BF16.
    """
    pieces = [
        probe.cancelling(rng, rows, min(TILE_COLS, cols - begin), tokens, has_bias)
        for begin in range(0, cols, TILE_COLS)
    ]
    weight, x = (torch.cat([getattr(piece, name) for piece in pieces], 1) for name in ("weight", "x"))
    return Inputs(weight, x, pieces[0].bias)


def between_tiles(rng: np.random.Generator, rows: int, cols: int, tokens: int, has_bias: bool) -> Inputs:
    """Tiles of columns cancel each other, in random pairs, each of them and each row of a magnitude of its own.

    What is left over tells in which order the sums of splits were added, even if they were rounded to BF16: sums of so
    few bits are added without any rounding where their magnitudes are alike.
    """
    weight, x = torch.zeros(rows, cols, dtype=torch.bfloat16), torch.zeros(tokens, cols, dtype=torch.bfloat16)
    place = rng.permutation(-(-cols // TILE_COLS))
    for one, other in place[: len(place) // 2 * 2].reshape(-1, 2):
        width = min(TILE_COLS, cols - TILE_COLS * int(max(one, other)))
        drawn = probe.ordinary(rng, rows, width, tokens, False)
        scale = torch.from_numpy(np.exp2(rng.integers(-20, 21, (rows, 1)))).to(torch.bfloat16)
        for tile, sign in ((one, 1), (other, -1)):
            at = TILE_COLS * int(tile) + torch.from_numpy(rng.permutation(width))
            weight[:, at], x[:, at] = sign * scale * drawn.weight, drawn.x
    return Inputs(weight, x, torch.zeros(rows, dtype=torch.bfloat16) if has_bias else None)


def special(rng: np.random.Generator, rows: int, cols: int, tokens: int, has_bias: bool) -> Inputs:
    """Ordinary inputs with NaNs of several payloads, infinities of both signs and zeros of both signs among them."""
    inputs = probe.ordinary(rng, rows, cols, tokens, has_bias)
    words = torch.tensor([0x7F81, -0x3F, 0x7F80, -0x80, 0x7FC0, 0, -0x8000], dtype=torch.int16).view(torch.bfloat16)

    def sprinkle(tensor: torch.Tensor, every: int) -> torch.Tensor:
        flat = tensor.clone().view(-1)
        at = torch.from_numpy(rng.permutation(flat.numel())[: max(1, flat.numel() // every)])
        flat[at] = words[torch.from_numpy(rng.integers(0, len(words), len(at)))]
        return flat.view(tensor.shape)

    bias = None if inputs.bias is None else sprinkle(inputs.bias, 4)
    return Inputs(sprinkle(inputs.weight, 4 * cols), sprinkle(inputs.x, 2 * cols), bias)


Make = Callable[[np.random.Generator, int, int, int, bool], Inputs]
"""Inputs from a generator, for numbers of rows, columns and tokens, with a bias or without."""

_KINDS: tuple[Make, ...] = (
    within_tiles, between_tiles, probe.cancelling, probe.ordinary, probe.wide, probe.tiny, special,
)  # fmt: skip
_MORE_ROUNDS = 4
_PLAIN = ("mma.m16n8k16", "mma.m16n8k8")
"""Instructions of the kernel that reads plain weights."""


@dataclass(frozen=True)
class _Case:
    inputs: Inputs
    """On the device, a chunk of rows."""
    expected: torch.Tensor
    """[tokens, rows]: what the linear under examination makes of the whole matrix, which repeats the chunk."""


class _Bench:
    """Runs the linear under examination and our kernels on the same inputs."""

    def __init__(self, linear: Linear, device: torch.device, product: Product) -> None:
        self.linear = linear
        self.device = device
        self.product = product
        self.chunk_rows = min(product.rows, max(_LEAST_ROWS, _CHUNK_BYTES // (2 * product.cols)))
        self.queue: TensorQueue = queues.queue_for(device)
        self._places = torch.arange(product.rows, device=device) % self.chunk_rows
        self._packed: tuple[Inputs, list[torch.Tensor]] | None = None

    def case(self, make: Make, rng: np.random.Generator) -> _Case:
        """Inputs of one kind."""
        product = self.product
        inputs = make(rng, self.chunk_rows, product.cols, product.tokens, product.has_bias)
        x = _placed(inputs.x, self.product.x_alignment, self.device)
        bias = None if inputs.bias is None else _placed(inputs.bias, ALIGNMENT, self.device)
        inputs = Inputs(_placed(inputs.weight, ALIGNMENT, self.device), x, bias)
        return _Case(inputs, self._run(inputs))

    def run(self, case: _Case) -> torch.Tensor:
        """Once more what the linear gives: sums that differ from run to run have no order."""
        return self._run(case.inputs)

    def _run(self, inputs: Inputs) -> torch.Tensor:
        product, bias = self.product, None
        x = inputs.x.view(*(1,) * (product.dims - 2), *inputs.x.shape) if product.dims > 1 else inputs.x.view(-1)
        if inputs.bias is not None:
            bias = _placed(inputs.bias[self._places], product.bias_alignment, self.device)
        weight = inputs.weight[self._places]
        return self.linear(x, weight, bias).reshape(product.tokens, product.rows).clone()

    def tells(self, case: _Case) -> bool:
        """Whether the inputs can tell orders apart: the products in the reverse order must differ in many outputs."""
        inputs, order = case.inputs, Order(self.product.cols, 1)
        back = Inputs(_placed(inputs.weight.flip(1)), _placed(inputs.x.flip(1)), None)
        differing = self._plain(inputs, order) != self._plain(back, order)
        return float(differing.float().mean()) >= _TELLING and bool(torch.isfinite(case.expected).all())

    def sieves(self, case: _Case, order: Order) -> bool:
        """Whether a few rows agree, without bias; or all, for an instruction that the plain kernel does not have."""
        if order.instruction not in _PLAIN:
            return self.agrees(case, order)
        got = self._plain(case.inputs, order)
        return _equal(got, case.expected[:, : got.shape[1]])

    def agrees(self, case: _Case, order: Order) -> bool:
        """Whether every output agrees, from tiles."""
        return _equal(self._fused(case.inputs, order)[:, self._places], case.expected)

    def _plain(self, inputs: Inputs, order: Order) -> torch.Tensor:
        tokens, rows = len(inputs.x), min(_SIEVE_ROWS, self.chunk_rows)
        out = _empty((tokens, rows), self.device)
        kernels.plain(self.queue, inputs.weight.data_ptr(), rows, order, 0, inputs.x.data_ptr(), tokens, out.data_ptr())
        return out

    def _fused(self, inputs: Inputs, order: Order) -> torch.Tensor:
        layout = TileLayout(self.chunk_rows, self.product.cols)
        if self._packed is None or self._packed[0] is not inputs:
            words = inputs.weight.view(torch.int16).cpu().numpy().view(np.uint16)
            packed = naive.pack(words)  # which packs what would not get smaller, too
            self._packed = (
                inputs,
                [_placed(torch.from_numpy(packed[name].copy()), ALIGNMENT, self.device) for name in PARTS],
            )
        bias = 0 if inputs.bias is None else inputs.bias.data_ptr()
        group = kernels.prepare(self.queue, [(addresses(self._packed[1]), layout, bias)], 1)
        group = replace(group, order=order)
        workspace = self.queue.zeros(kernels.workspace_bytes(group, self.queue.properties))
        out = _empty((len(inputs.x), self.chunk_rows), self.device)
        kernels.linear(self.queue, group, inputs.x.data_ptr(), len(inputs.x), out.data_ptr(), workspace.address)
        return out


def _cuts(cols: int, tiles: int, splits: int) -> Iterator[Order]:
    yield Order(cols, splits)
    for unit in _UNITS:  # equal ones, rounded up to a multiple, and a last one with what is left
        each = -(-tiles // splits // unit) * unit
        if splits > 1 and (splits - 1) * each < tiles:
            yield Order(cols, splits, each)
    if tiles % splits:
        yield Order(cols, splits, tiles // splits, tiles % splits)


def _is_distinct(splits: int, reduction: str, partials: str) -> bool:
    """Whether it is not the same as one that comes before."""
    if splits == 1:
        return reduction == "ascending" and partials == "F32"
    if splits == 2:
        return reduction == "ascending" and partials != "running BF16"
    return not (splits == 3 and reduction == "neighbours") and (
        reduction not in REDUCTIONS[2:] or splits <= MOST_TREE_SPLITS
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a.view(torch.int16), b.view(torch.int16)))


def _empty(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return queues.empty_bytes(2 * shape[0] * shape[1], device).view(torch.bfloat16).view(shape)


def _placed(tensor: torch.Tensor, alignment: int = ALIGNMENT, device: torch.device | None = None) -> torch.Tensor:
    """A contiguous copy on a device, at an address that ``alignment`` divides and no larger power of two does."""
    offset = alignment % ALIGNMENT
    nbytes = tensor.numel() * tensor.element_size()
    memory = queues.empty_bytes(nbytes + offset, device or tensor.device)[offset:]
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
