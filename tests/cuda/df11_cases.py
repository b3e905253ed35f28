"""DFloat11 units for the kernels' tests, and such units in device memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.df11 import Df11Unit, encode_unit, naive
from bitforbit.cuda import df11

Words = npt.NDArray[np.uint16]

GOLDEN = Path(__file__).parent.parent / "data" / "df11-official"
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


def last_code_in_a_block_of_its_own() -> Df11Unit:
    """The last code runs into the last block and ends with a byte: no code starts there, a position is missing."""
    rare = dict(zip(range(100, 116), fibonacci(16), strict=True))
    counts = {**rare, 120: 4 * sum(rare.values())}
    lengths = encode_unit([shuffled(counts)]).luts[-1]
    counts[120] = 32768 + 8 - sum(int(lengths[e]) * c for e, c in rare.items())
    words = shuffled(counts)
    unit = encode_unit([words[np.argsort((words >> 7 & 0xFF) == 100, kind="stable")]])
    assert (unit.num_blocks, unit.output_positions.size) == (2, 4 * 2)
    return unit


def with_code_of(counts: dict[int, int], words: Words) -> Df11Unit:
    """Words in the code of other counts, so that its longest codes may be the most frequent ones."""
    codes = naive.code_table(Counter(counts))
    pieces = [codes[int(word) >> 7 & 0xFF] for word in words]
    starts = np.cumsum([0, *map(len, pieces)])
    stream, end = "".join(pieces), int(starts[-1])
    starts = starts if end % 8 else starts[:-1]  # the end mark counts as a code
    stream += codes[naive.EOF][: -end % 8].ljust(-end % 8, "0")
    blocks = -(-len(stream) // 32768)
    windows, first = np.unique(starts // 64, return_index=True)
    gaps = np.zeros(512 * blocks, np.int64)
    gaps[windows] = starts[first] % 64
    positions = [*np.searchsorted(starts, 32768 * np.arange(blocks)).tolist(), words.size]
    return Df11Unit(
        luts=naive.lookup_tables(codes),
        encoded_exponent=naive.pack(stream),
        sign_mantissa=((words >> 8 & 0x80) | (words & 0x7F)).astype(np.uint8),
        output_positions=np.array(positions, "<u4").view(np.uint8),
        gaps=naive.pack("".join(f"{gap:05b}" for gap in gaps)),
        split_positions=np.empty(0, np.int64),
    )


def golden_units() -> dict[str, Df11Unit]:
    """The units that the official tool wrote."""
    from safetensors import safe_open

    units = {}
    for path in sorted(GOLDEN.glob("*/df11/*.safetensors")):
        with safe_open(path, "np") as file:
            for key in sorted(file.keys()):
                if key.endswith(".luts"):
                    name = key.removesuffix("luts")
                    parts = {p: file.get_tensor(name + p) for p in Df11Unit.__dataclass_fields__}
                    units[f"{path.parent.parent.name}/{name}"] = Df11Unit(**parts)
    return units


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

    def decode(self, begin: int = 0, end: int | None = None, *, offset: int = 0, guard: int = 8) -> tuple[Words, int]:
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
        return words[offset : offset + end - begin], self._status(status)

    def rows(self, first: int, cols: int, rows: int, ids: npt.NDArray[np.signedinteger[Any]]) -> tuple[Words, int]:
        """Rows of a matrix ``[count, cols]``, and the status."""
        out = self.queue.empty(2 * ids.size * cols)
        status = self.queue.zeros(4)
        buffer = self.queue.upload(ids.tobytes())
        df11.rows(
            self.queue, self.parts, self.geometry, first, cols, rows, buffer.address, ids.itemsize, ids.size,
            out.address, status.address,
        )  # fmt: skip
        words = np.frombuffer(self.queue.download(out), np.uint16)
        return words.reshape(ids.size, cols), self._status(status)

    def _status(self, buffer: Any) -> int:
        return int(np.frombuffer(self.queue.download(buffer), np.uint32)[0])


def assert_decodes(queue: Any, unit: Df11Unit, words: Words) -> None:
    """The whole unit comes back, bit for bit."""
    got, status = OnDevice(queue, unit).decode(guard=0)
    np.testing.assert_array_equal(got, words)
    assert status == 0
