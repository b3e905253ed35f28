"""Memory of one GPU: weights, decoded weights, keys and values, activations, and what is kept free.

Pipeline parallel: consecutive layers on each GPU, the embedding on the first, the head on the last. Tensor parallel:
every matrix is cut into equal parts; key-value heads are cut too, down to one per GPU, which is then on several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bitforbit.errors import PlanError
from bitforbit.planner.cache import KvSetting, LayerCache
from bitforbit.planner.shapes import ITEM_BYTES, Dimensions, Layer, Matrix, Shape
from bitforbit.planner.weights import Storage


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. ``scratch``: decoded weights; ``activations``: everything else for a moment."""

    weights: int
    scratch: int
    kv: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, without what is kept free."""
        return self.weights + self.scratch + self.kv + self.activations


@dataclass(frozen=True)
class Split:
    """``tensor`` GPUs share every matrix, ``pipeline`` groups of them share the layers."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.tensor * self.pipeline

    def check(self, shape: Shape) -> None:
        """Raise PlanError where the model cannot be cut so."""
        d = shape.dimensions
        if self.tensor < 1 or self.pipeline < 1:
            raise PlanError(f"--tp, --pp: expected at least 1, got {self.tensor} and {self.pipeline}")
        inner = sorted({m.cols for layer in shape.layers for m in layer.matrices if _is_down(m)})
        if not _divides(d, inner, self.tensor):
            fitting = [str(n) for n in range(1, d.heads + 1) if _divides(d, inner, n)]
            widths = f" and the MLPs' width of {' and '.join(map(str, inner))}" if inner else ""
            raise PlanError(
                f"--tp {self.tensor}: expected a number that divides {d.heads} heads{widths}, and that divides "
                f"{d.kv_heads} key-value heads or is a multiple of them; possible: {', '.join(fitting)}"
            )
        if self.pipeline > d.layers:
            raise PlanError(f"--pp {self.pipeline}: expected at most one GPU per layer, of which there are {d.layers}")

    def stages(self, shape: Shape) -> list[range]:
        """Layers of each group, as equal as possible; the first and the last have the fewer ones."""
        count, groups = len(shape.layers), self.pipeline
        sizes = [count // groups] * groups
        order = sorted(range(groups), key=lambda i: (i in (0, groups - 1), i))
        for i in order[: count % groups]:
            sizes[i] += 1
        starts = [sum(sizes[:i]) for i in range(groups)]
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _is_down(matrix: Matrix) -> bool:
    """Whether its columns are the inner width of an MLP, or of an expert, each of which is cut as well."""
    return matrix.name.startswith("mlp.") and "down" in matrix.name


def _divides(d: Dimensions, inner: Sequence[int], tensor: int) -> bool:
    heads = d.heads % tensor == 0 and (d.kv_heads % tensor == 0 or tensor % d.kv_heads == 0)
    return heads and all(width % tensor == 0 for width in inner)


@dataclass(frozen=True)
class Load:
    """What is to be generated: ``batch`` sequences of ``context`` tokens, of which ``call`` are read at a time."""

    context: int
    batch: int = 1
    call: int = 2048

    def __post_init__(self) -> None:
        if min(self.context, self.batch, self.call) < 1:
            raise PlanError(
                f"expected a context, a batch and a chunk of at least 1, got {self.context}, {self.batch}, {self.call}"
            )


class Stage:
    """The layers of one group of GPUs, and what one of these GPUs holds."""

    def __init__(
        self, shape: Shape, split: Split, index: int, storage: Storage, kv: KvSetting,
        layers: Sequence[Layer] | None = None,
    ) -> None:  # fmt: skip
        """``index``: of the group; ``layers``: others than its own. Raises KvSpecError for heads that the cache has no
        groups for.
        """
        self.shape, self.split, self.storage = shape, split, storage
        self.first, self.last = index == 0, index == split.pipeline - 1
        own = [shape.layers[i] for i in split.stages(shape)[index]] if layers is None else layers
        self.layers: Sequence[Layer] = own
        d = shape.dimensions
        heads = max(1, d.kv_heads // split.tensor)
        item = max(2, ITEM_BYTES[d.dtype])  # of activations: FP8 models compute in 16 bits
        self.item = item
        # Most layers are alike: each kind is counted once.
        self.caches = Counter(
            LayerCache.of(kv, heads, d.head_dim, item, layer.window, max(1, d.heads // split.tensor // heads), d.caps)
            for layer in self.layers
            if layer.caches
        )
        self._scratch: dict[tuple[bool, bool], int] = {}

    @property
    def ends(self) -> list[Matrix]:
        """Embedding and head, as far as they are here; once if they are the same."""
        shape = self.shape
        ends = [shape.embedding, *shape.other] if self.first else []
        if self.last and not (self.first and shape.head is None):
            ends.append(shape.output)
        return ends

    def part(self, matrix: Matrix) -> float:
        """Share of a matrix on one GPU."""
        tensor, d = self.split.tensor, self.shape.dimensions
        return 1 / min(tensor, d.kv_heads) if matrix.heads and matrix.name != "qkv" else 1 / tensor

    @cached_property
    def weights(self) -> int:
        """Bytes of weights."""
        matrices = Counter([*self.ends, *(m for layer in self.layers for m in layer.matrices)])
        coded = sum(count * self.part(m) * self.storage.nbytes(m) for m, count in matrices.items())
        vectors = sum(layer.vectors for layer in self.layers) + (self.shape.vectors if self.last else 0)
        return int(coded) + vectors * self.storage.item

    def scratch(self, load: Load) -> int:
        """Bytes of decoded weights at a time."""
        call = load.batch * min(load.call, load.context)
        key = (self.storage.decodes(call), self.storage.decodes(load.batch))
        if key in self._scratch:
            return self._scratch[key]
        ends = [self.shape.output] if self.last else []
        if self.storage.method == "df11" and self.first:
            ends.append(self.shape.embedding)
        whole = self.storage.scratch(tuple(self.layers), tuple(ends), call, load.batch)
        self._scratch[key] = -(-whole // self.split.tensor)
        return self._scratch[key]

    def kv(self, load: Load) -> int:
        """Bytes of keys and values that stay."""
        return sum(count * cache.resident(load.context, load.batch) for cache, count in self.caches.items())

    def activations(self, load: Load) -> int:
        """Bytes of everything that exists for a moment: an estimate, checked against measured peaks in the tests.

        Of a call's tokens the hidden states and their copies, and the wider of MLP and attention; or the logits of the
        last token of each row, in the model's dtype and in FP32.
        """
        d, tensor, shape = self.shape.dimensions, self.split.tensor, self.shape
        tokens = load.batch * min(load.call, load.context)
        hidden = tokens * 4 * d.hidden * self.item
        passing = max((c.passing(load.context, load.batch, load.call) for c in self.caches), default=0)
        attention = tokens * (shape.attention_width // tensor) * self.item + passing
        mlp = tokens * (shape.mlp_width // tensor) * self.item
        logits = load.batch * d.vocab * (self.item + 4) if self.last else 0
        return max(hidden + attention, hidden + mlp, logits)

    def memory(self, load: Load) -> Memory:
        """All of it, on one GPU of this group."""
        return Memory(self.weights, self.scratch(load), self.kv(load), self.activations(load))
