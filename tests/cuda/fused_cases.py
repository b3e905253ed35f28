"""Products straight from tiles, on the device of a queue, for their tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bitforbit.codecs.base import Bytes
from bitforbit.cuda.fused import linear, reference
from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.fused.plan import ARRIVED_BYTES, Variant
from bitforbit.cuda.tiles import naive
from bitforbit.cuda.tiles.kinds import BF16, Kind
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from helpers.tile_cases import Words, gaussian


def bf16(values: Any) -> Words:
    """Numbers as BF16 words."""
    return reference.to_bf16(np.asarray(values, np.float32))


def floats(words: Words) -> Any:
    """BF16 words as FP64."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def activations(tokens: int, cols: int, seed: int = 0) -> Words:
    """As they come from a layer norm."""
    return bf16(np.random.default_rng(seed).standard_normal((tokens, cols)))


def cancelling(rows: int, cols: int, tokens: int, seed: int = 0) -> tuple[Words, Words]:
    """Weights and x of which every product occurs twice with opposite signs: all that is left is how sums were rounded.

    ``cols`` is even. Ordinary inputs show another order in one BF16 output of a thousand, these in nearly all.
    """
    half = gaussian(rows, cols // 2, seed)
    x = activations(tokens, cols // 2, seed)
    places = np.random.default_rng(seed).permutation(cols)
    return np.hstack([half, half])[:, places], np.hstack([x, x ^ 0x8000])[:, places]


def on_hopper(queue: Any) -> Any:
    """The queue, if its device has the instructions of compute capability 9.0; else the test is skipped."""
    if queue.properties.compute_capability != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return queue


class DeviceGroup:
    """Matrices with the same input, and a workspace for their products."""

    def __init__(
        self,
        queue: Any,
        matrices: Sequence[Words],
        biases: Sequence[Words | None] | None = None,
        *,
        splits: int | None = None,
        kind: Kind = BF16,
        bias_types: Sequence[str] | None = None,
        parts: Sequence[dict[str, Bytes]] | None = None,
    ) -> None:
        self.queue = queue
        self._buffers: list[Any] = []
        self._order: Order | None = None
        described = []
        for i, words in enumerate(matrices):
            packed = naive.pack(words, kind) if parts is None else parts[i]
            at = [(self._upload(packed[name].tobytes()), packed[name].nbytes) for name in PARTS]
            bias = None if biases is None else biases[i]
            described.append((at, TileLayout(*words.shape, kind), 0 if bias is None else self._upload(bias.tobytes())))
        self.group = linear.prepare(queue, described, splits, bias_types)
        if hasattr(queue, "relocate"):
            queue.relocate(self.group.table.address)
        self._workspace = queue.zeros(linear.workspace_bytes(self.group, queue.properties))

    @property
    def order(self) -> Order:
        """Of the sums."""
        return self._order or self.group.order

    def use(self, order: Order) -> None:
        """From now on, sum in this order."""
        self._order = order
        nbytes = plans.workspace_bytes(self.group.rows, order, self.queue.properties)
        self._workspace = self.queue.zeros(nbytes)

    def linear(self, x: Words, variant: Variant | None = None, *, offset: int = 0) -> list[Words]:
        """The products with x [tokens, cols], which lies so many bytes after an aligned address."""
        rows, tokens = self.group.rows, len(x)
        memory = self.queue.upload(bytes(offset) + x.tobytes())
        out = self.queue.empty(2 * tokens * sum(rows))
        linear.linear(
            self.queue, self.group, memory.address + offset, tokens, out.address, self._workspace.address, variant,
            self._order,
        )  # fmt: skip
        assert self.queue.download(self._workspace, ARRIVED_BYTES) == bytes(ARRIVED_BYTES)
        flat = np.frombuffer(self.queue.download(out), np.uint16)
        ends = np.cumsum([tokens * count for count in rows])
        return [part.reshape(tokens, count) for part, count in zip(np.split(flat, ends[:-1]), rows, strict=True)]

    def _upload(self, data: bytes) -> int:
        self._buffers.append(self.queue.upload(data))
        return int(self._buffers[-1].address)


def plain(
    queue: Any, words: Words, x: Words, order: Any, bias: Any | None = None, outputs: str = "BF16",
    bias_type: str | None = None,
) -> Words:  # fmt: skip
    """The product by the kernel that reads plain weights."""
    weights, memory = queue.upload(words.tobytes()), queue.upload(x.tobytes())
    on_device = None if bias is None else queue.upload(bias.tobytes())
    out = queue.empty(2 * len(x) * len(words))
    linear.plain(
        queue, weights.address, len(words), order, 0 if on_device is None else on_device.address, memory.address,
        len(x), out.address, outputs, bias_type,
    )  # fmt: skip
    return np.frombuffer(queue.download(out), np.uint16).reshape(len(x), len(words))
