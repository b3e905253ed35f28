"""What the tests of the planes kernels share: hostile data, and a matrix whose parts are in device memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitforbit import dtypes
from bitforbit.codecs.base import EncodedTensor
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.codecs.planes.layout import Layout
from bitforbit.cuda.planes import decode

CODEC = PlanesCodec()


def hostile_bytes(kind: str, wide: bool, n: int, seed: int, style: str) -> np.ndarray:
    """Floats whose exponents are random, trained-like, constant, or far apart; wide: BF16 as F32. Bytes."""
    rng = np.random.default_rng(seed)
    layout = dtypes.FLOAT_LAYOUTS[kind]
    rest = rng.integers(0, 1 << (1 + layout.mantissa_bits), n).astype(np.uint32)
    top = 1 << layout.exponent_bits
    exponent = {
        "random": lambda: rng.integers(0, top, n),
        "trained": lambda: np.clip(top // 2 - rng.geometric(0.5, n), 0, top - 1),
        "constant": lambda: np.full(n, top - 1),
        "far": lambda: rng.choice([0, 1, top // 2, top - 2, top - 1], n),
        "zeros": lambda: np.where(rng.random(n) < 0.7, 0, rng.integers(0, top, n)),
    }[style]()
    words = dtypes.join(exponent.astype(np.uint32), rest, layout)
    if wide:
        return np.frombuffer((words << 16).astype("<u4").tobytes(), np.uint8)
    return np.frombuffer(words.astype(f"<u{layout.itemsize}").tobytes(), np.uint8)


def encoded(data: np.ndarray, kind: str, wide: bool, rows: int, cols: int, rows_per_table: int = 0) -> EncodedTensor:
    """A matrix by the CPU's encoder."""
    dtype = "F32" if wide else kind
    return CODEC.encode_always(data, dtype, (rows, cols), kind, 1, rows_per_table=rows_per_table)


class Case:
    """An encoded matrix in device memory, prepared."""

    def __init__(self, queue: Any, tensor: EncodedTensor, wide: bool = False) -> None:
        self._prepare(queue, dict(tensor.parts), Layout.from_config(tensor.config, tensor.dtype, tensor.shape), wide)

    @classmethod
    def of_parts(cls, queue: Any, parts: Mapping[str, np.ndarray], layout: Layout, wide: bool = False) -> Case:
        """Parts that may be damaged."""
        case = cls.__new__(cls)
        case._prepare(queue, parts, layout, wide)
        return case

    def _prepare(self, queue: Any, parts: Mapping[str, np.ndarray], layout: Layout, wide: bool) -> None:
        self.queue, self.layout, self.wide = queue, layout, wide
        self.buffers = [queue.upload(parts[name].tobytes()) for name in CODEC.part_names]
        self.parts = [(buffer.address, buffer.nbytes) for buffer in self.buffers]
        self.workspace = queue.empty(decode.workspace_bytes(layout))
        self.word = queue.zeros(4)
        decode.prepare(queue, self.parts, layout, self.workspace.address, self.word.address)
        self.row_bytes = layout.cols * (4 if wide else dtypes.FLOAT_LAYOUTS[layout.kind].itemsize)

    def decode(self, begin: int, end: int) -> bytes:
        """Rows [begin, end)."""
        out = self.queue.empty((end - begin) * self.row_bytes)
        decode.decode(
            self.queue, self.parts, self.layout, self.wide, begin, end, out.address, self.workspace.address,
            self.word.address,
        )  # fmt: skip
        return self.queue.download(out)

    def rows(self, ids: np.ndarray) -> bytes:
        """Rows by id."""
        out = self.queue.empty(ids.size * self.row_bytes)
        given = self.queue.upload(ids.tobytes())
        decode.rows(
            self.queue, self.parts, self.layout, self.wide, given.address, ids.itemsize, ids.size, out.address,
            self.workspace.address, self.word.address,
        )  # fmt: skip
        return self.queue.download(out)

    def status(self) -> int:
        """What the kernels found."""
        return int.from_bytes(self.queue.download(self.word), "little")
