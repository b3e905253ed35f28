"""Encoding on the GPU, emulated, against the CPU encoder: the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from bitforbit import dtypes
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.codecs.planes.layout import matrix_view
from bitforbit.cpu import planes as native
from bitforbit.cuda.planes import encode as gpu
from bitforbit.errors import UsageError
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue

KINDS = list(gpu.KINDS)
SHAPES = [(1, 1), (1, 63), (1, 64), (1, 65), (2, 3), (16, 64), (17, 130), (33, 200), (5, 4600), (100, 72)]
STYLES = ["random", "trained", "constant", "far", "zeros", "uniform"]


def make_bytes(kind: str, wide: bool, n: int, style: str, seed: int = 0) -> np.ndarray:
    """Bytes of n floats whose exponents are random, as in trained weights, constant, ..."""
    rng = np.random.default_rng(seed)
    layout = dtypes.FLOAT_LAYOUTS[kind]
    top = 1 << layout.exponent_bits
    exponents = {
        "random": lambda: rng.integers(0, top, n),
        "trained": lambda: np.clip(top // 2 - rng.geometric(0.5, n), 0, top - 1),
        "constant": lambda: np.full(n, top - 1),
        "far": lambda: rng.choice([0, 1, top // 2, top - 2, top - 1], n),
        "zeros": lambda: np.where(rng.random(n) < 0.7, 0, rng.integers(0, top, n)),
        "uniform": lambda: np.arange(n) % top,
    }[style]()
    rest = rng.integers(0, 1 << (1 + layout.mantissa_bits), n).astype(np.uint32)
    words = dtypes.join(exponents.astype(np.uint32), rest, layout)
    if wide:
        return np.frombuffer((words.astype("<u4") << 16).tobytes(), np.uint8)
    return np.frombuffer(words.astype(f"<u{layout.itemsize}").tobytes(), np.uint8)


def queue_of(seed: int = 0) -> EmulatedQueue:
    return EmulatedQueue(EmulatedLauncher(seed))


def assert_same_as_cpu(
    data: np.ndarray, kind: str, wide: bool, rows: int, cols: int, rows_per_table: int = 0, seed: int = 0
) -> None:
    queue = queue_of(seed)
    matrix = queue.upload(data.tobytes())
    found = gpu.encode(queue, matrix.address, kind, wide, rows, cols, rows_per_table, always=True)
    assert found is not None
    expected = native.encode(data, kind, wide, rows, cols, rows_per_table, 1)
    compare(queue, found, expected)


def compare(queue: EmulatedQueue, found: tuple, expected: tuple) -> None:
    assert found[0] == expected[0]
    assert list(found[1]) == list(expected[1])
    for name, part in expected[1].items():
        np.testing.assert_array_equal(np.frombuffer(queue.download(found[1][name]), np.uint8), part, name)


@pytest.mark.parametrize(("kind", "wide"), KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_parts_are_those_of_the_cpu(kind: str, wide: bool, style: str) -> None:
    for seed, (rows, cols) in enumerate(SHAPES):
        data = make_bytes(kind, wide, rows * cols, style, seed)
        assert_same_as_cpu(data, kind, wide, rows, cols, seed=seed)
