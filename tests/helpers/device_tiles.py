"""Tiles in device memory, for the tests of their kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.base import Bytes
from bitforbit.cuda.tiles import decode, naive
from bitforbit.cuda.tiles.kinds import BF16, Elements, Kind
from bitforbit.cuda.tiles.layout import PARTS, TileLayout


class DeviceTiles:
    """The parts of a matrix on the device of a queue."""

    def __init__(self, queue: Any, parts: dict[str, Bytes], rows: int, cols: int, kind: Kind = BF16) -> None:
        self.queue = queue
        self.layout = TileLayout(rows, cols, kind)
        self._buffers = [queue.upload(parts[name].tobytes()) for name in PARTS]
        self.parts = [(buffer.address, buffer.nbytes) for buffer in self._buffers]

    @classmethod
    def of(cls, queue: Any, words: Elements, kind: Kind = BF16) -> DeviceTiles:
        """A matrix packed by the reference."""
        return cls(queue, naive.pack(words, kind), *words.shape, kind)

    def decode(self, begin: int = 0, end: int | None = None) -> Elements:
        """Rows [begin, end)."""
        end = self.layout.rows if end is None else end
        out = self.queue.empty(self.layout.kind.item_bytes * (end - begin) * self.layout.cols)
        decode.decode(self.queue, self.parts, self.layout, begin, end, out.address)
        return self._words(out, end - begin)

    def rows(self, ids: npt.NDArray[Any], *, with_status: bool = True) -> tuple[Elements, int]:
        """Rows by id, and the status."""
        on_device, status = self.queue.upload(ids.tobytes()), self.queue.zeros(4)
        out = self.queue.empty(self.layout.kind.item_bytes * ids.size * self.layout.cols)
        decode.rows(
            self.queue, self.parts, self.layout, on_device.address, ids.itemsize, ids.size, out.address,
            status.address if with_status else 0,
        )  # fmt: skip
        return self._words(out, ids.size), int.from_bytes(self.queue.download(status), "little")

    def _words(self, buffer: Any, rows: int) -> Elements:
        dtype = np.uint16 if self.layout.kind.item_bytes == 2 else np.uint8
        return np.frombuffer(self.queue.download(buffer), dtype).reshape(rows, self.layout.cols)
