"""DFloat11 units for the kernels' tests, and what every test does with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.df11 import Df11Unit, encode_unit
from bitforbit.cuda import df11

Words = npt.NDArray[np.uint16]

UNTOUCHED = 0xA5A5
"""Memory fresh from a queue."""


def words_of(exponents: npt.ArrayLike, seed: int = 0) -> Words:
    """BF16 words with these exponents and random signs and mantissas."""
    exponents = np.asarray(exponents, np.uint16)
    noise = np.random.default_rng(seed).integers(0, 1 << 16, exponents.size, dtype=np.uint16)
    return (noise & 0x807F) | exponents << 7


def shuffled(counts: dict[int, int], seed: int = 0) -> Words:
    """Words with so many of each exponent."""
    exponents = np.repeat(list(counts), list(counts.values()))
    return words_of(np.random.default_rng(seed).permutation(exponents), seed)


def gaussian(size: int, seed: int = 0) -> Words:
    """Weights as models have them, exact zeros and outliers among them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size, np.float32) * 0.02
    values[rng.random(size) < 0.01] = 0
    values[rng.random(size) < 0.01] *= 1e9
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def fibonacci(count: int) -> list[int]:
    """Counts that give codes of all lengths up to ``count``."""
    values = [1, 1]
    while len(values) < count:
        values.append(values[-1] + values[-2])
    return values


class OnDevice:
    """A unit's parts in device memory."""

    def __init__(self, queue: Any, unit: Df11Unit) -> None:
        self.queue = queue
        self.geometry, parts = df11.prepare(
            unit.luts, unit.encoded_exponent, unit.sign_mantissa, unit.output_positions, unit.gaps
        )
        self.host = {name: np.array(part) for name, part in parts.items()}
        self.upload()

    def upload(self) -> None:
        """Copy the parts, as they are on the host now, to the device."""
        self.buffers = [self.queue.upload(self.host[name].tobytes()) for name in df11.PARTS]

    @property
    def parts(self) -> list[tuple[int, int]]:
        return [(buffer.address, buffer.nbytes) for buffer in self.buffers]

    def decode(self, begin: int = 0, end: int | None = None, *, offset: int = 0, guard: int = 16) -> tuple[Words, int]:
        """Weights [begin, end), decoded to ``offset`` elements behind an aligned address, and the status.

        Memory before and behind them must stay as it was.
        """
        end = self.geometry.elements if end is None else end
        out = self.queue.empty(2 * (offset + end - begin + guard))
        status = self.queue.zeros(4)
        df11.decode(self.queue, self.parts, self.geometry, begin, end, out.address + 2 * offset, status.address)
        words = np.frombuffer(self.queue.download(out), np.uint16)
        assert (words[:offset] == UNTOUCHED).all(), "wrote before the output"
        assert (words[offset + end - begin :] == UNTOUCHED).all(), "wrote behind the output"
        return words[offset : offset + end - begin], self.status(status)

    def rows(self, first: int, cols: int, rows: int, ids: npt.NDArray[np.signedinteger[Any]]) -> tuple[Words, int]:
        """Rows of a matrix ``[count, cols]``, and the status."""
        out = self.queue.empty(2 * (ids.size * cols + 16))
        status = self.queue.zeros(4)
        buffer = self.queue.upload(ids.tobytes())
        df11.rows(
            self.queue, self.parts, self.geometry, first, cols, rows, buffer.address, ids.itemsize, ids.size,
            out.address, status.address,
        )  # fmt: skip
        words = np.frombuffer(self.queue.download(out), np.uint16)
        assert (words[ids.size * cols :] == UNTOUCHED).all(), "wrote behind the output"
        return words[: ids.size * cols].reshape(ids.size, cols), self.status(status)

    def status(self, buffer: Any) -> int:
        return int(np.frombuffer(self.queue.download(buffer), np.uint32)[0])


def assert_decodes(queue: Any, words: Words) -> Df11Unit:
    """The whole unit comes back, bit for bit."""
    unit = encode_unit([words])
    got, status = OnDevice(queue, unit).decode()
    np.testing.assert_array_equal(got, words)
    assert status == 0
    return unit
