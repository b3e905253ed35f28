"""Claim: decoding on the GPU runs near the speed of a copy.

Random weights (Gaussian, standard deviation 0.02). Every result is compared with the weights bit for bit before it is
timed; rows of an embedding and conversions at loading too. A copy of 1 GiB in GPU memory is measured first; figures
count all bytes read and written. Calls take turns over more data than the L2 cache holds, in a CUDA graph.

    python -m benchmarks.gpu_decode [--dry-run] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import bitforbit.ops  # noqa: F401  (registers the operators)
from benchmarks import gpu_common
from benchmarks.common import table
from benchmarks.gpu_common import Meter, Report, same_bits
from bitforbit.codecs.base import Bytes
from bitforbit.cpu import default_threads
from bitforbit.ops import gpu
from bitforbit.ops.checks import PARTS

STANDARD_DEVIATION = 0.02
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Size:
    """What is decoded."""

    copy_bytes: int
    matrices: tuple[tuple[int, int], ...]
    """[rows, cols] of the linears of Llama-3.1-8B: k and v; q and o; gate and up; down; LM head."""
    df11: tuple[int, int]
    embedding: tuple[int, int]
    ids: tuple[int, ...]


FULL = Size(
    1 << 30,
    ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096)),
    (4096, 65536),
    (128256, 4096),
    (1, 64, 2048),
)
TINY = Size(1 << 12, ((49, 192),), (8, 512), (48, 64), (1, 5))


@dataclass
class Row:
    """One line of the result."""

    what: str
    shape: tuple[int, ...]
    nbytes: int
    """Read and written by one call."""
    microseconds: float | None
    bits_per_weight: float | None = None
    graph: bool = True
    """Whether the time is that of the device alone; otherwise it contains allocations and waiting for results."""

    def to_json(self, copy: float | None) -> dict[str, Any]:
        """With speed, and the share of a copy's."""
        speed = gpu_common.per_second(self.nbytes, self.microseconds)
        return {
            **vars(self),
            "gb_per_s": speed,
            "of_copy": None if speed is None or copy is None else speed / copy,
        }


def weights(rows: int, cols: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Gaussian BF16 weights ``[rows, cols]``."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
    return out.normal_(std=STANDARD_DEVIATION, generator=generator)


def nbytes(tensors: Tensors) -> int:
    """Of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copies(tensors: Tensors, count: int) -> list[tuple[torch.Tensor, ...]]:
    """The tensors, and clones of them."""
    return [tuple(tensors), *(tuple(tensor.clone() for tensor in tensors) for _ in range(count - 1))]


def bound(function: Callable[..., torch.Tensor], sets: Sequence[Tensors], *arguments: Any) -> list[Callable[[], Any]]:
    """One call per set of parts."""
    return [lambda parts=parts: function(*parts, *arguments) for parts in sets]  # type: ignore[misc]


def copy(meter: Meter, copy_bytes: int) -> Row:
    """A copy within the GPU's memory."""
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=meter.device).random_(generator=None)
    target = torch.empty_like(source)
    return Row(
        "copy",
        (copy_bytes,),
        2 * copy_bytes,
        meter.microseconds([lambda: target.copy_(source)]),
    )


def tiles(meter: Meter, matrix: torch.Tensor) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Packing and decoding of tiles."""
    rows, cols = matrix.shape
    found = gpu.pack_tiles(matrix)
    assert found is not None, "Gaussian weights get smaller"
    parts = tuple(found.values())
    decode = torch.ops.bitforbit.tiles_decode
    same_bits(decode(*parts, rows, cols, 0, rows), matrix, "tiles")
    traffic, bits = nbytes(parts) + nbytes([matrix]), 8 * nbytes(parts) / matrix.numel()
    sets = copies(parts, meter.rotations(traffic))
    times = meter.microseconds(bound(decode, sets, rows, cols, 0, rows))
    packing = meter.eager_microseconds(lambda: gpu.pack_tiles(matrix))
    return [
        Row("tiles to BF16", (rows, cols), traffic, times, bits),
        Row("BF16 to tiles", (rows, cols), traffic, packing, bits, graph=False),
    ], found


def planes(meter: Meter, matrix: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> list[Row]:
    """Encoding and decoding of planes, and their way to tiles and back."""
    rows, cols = matrix.shape
    encoded = gpu.encode_planes(matrix)
    assert encoded is not None, "Gaussian weights get smaller"
    parts = tuple(encoded.parts[part] for part in PARTS)
    same_parts(encoded.parts, cpu_planes(matrix), "planes encoded on the GPU and on the CPU")
    shape = ("BF16", rows, cols, encoded.config["rows_per_table"])
    decode = torch.ops.bitforbit.decode
    same_bits(decode(*parts, *shape, torch.bfloat16, 0, rows), matrix, "planes")
    converted = gpu.planes_to_tiles(parts, *shape, torch.bfloat16)
    assert converted is not None
    for name, part in packed.items():
        same_bits(converted[name], part, f"{name} of tiles from planes")
    if packed:
        per_table, back = gpu.tiles_to_planes(tuple(packed.values()), rows, cols)
        assert per_table == encoded.config["rows_per_table"]
        for name in PARTS:
            same_bits(back[name], encoded.parts[name], f"{name} of planes from tiles")
    traffic, bits = nbytes(parts) + nbytes([matrix]), 8 * nbytes(parts) / matrix.numel()
    sets = copies(parts, meter.rotations(traffic))
    times = meter.microseconds(bound(decode, sets, *shape, torch.bfloat16, 0, rows))
    both = nbytes(parts) + nbytes(list(converted.values()))
    return [
        Row("planes to BF16", (rows, cols), traffic, times, bits),
        Row(
            "planes to tiles",
            (rows, cols),
            both,
            meter.eager_microseconds(lambda: gpu.planes_to_tiles(parts, *shape, torch.bfloat16)),
            graph=False,
        ),
        Row(
            "tiles to planes",
            (rows, cols),
            both,
            meter.eager_microseconds(lambda: gpu.tiles_to_planes(tuple(converted.values()), rows, cols)),
            graph=False,
        ),
        Row(
            "BF16 to planes",
            (rows, cols),
            traffic,
            meter.eager_microseconds(lambda: gpu.encode_planes(matrix)),
            bits,
            graph=False,
        ),
    ]


def cpu_planes(matrix: torch.Tensor) -> dict[str, Bytes]:
    """The parts that the CPU's encoder gives."""
    from bitforbit.codecs.planes.codec import PlanesCodec

    data = matrix.cpu().view(torch.uint8).numpy().reshape(-1)
    encoded = PlanesCodec().encode(data, "BF16", tuple(matrix.shape), default_threads())
    assert encoded is not None
    return dict(encoded.parts)


def same_parts(got: Mapping[str, torch.Tensor], expected: Mapping[str, Bytes], what: str) -> None:
    """Raise AssertionError unless the parts have the same bytes."""
    for name, part in expected.items():
        same_bits(got[name].cpu(), torch.from_numpy(np.ascontiguousarray(part)), f"{what}: {name}")


def df11(meter: Meter, size: Size) -> list[Row]:
    """Decoding of a DFloat11 unit."""
    from bitforbit.codecs.df11 import encode

    matrix = weights(*size.df11, meter.device)
    words = matrix.cpu().view(torch.int16).numpy().view(np.uint16).reshape(-1)
    unit = encode.encode_unit([words.reshape(matrix.shape)], threads=default_threads())
    geometry, found = gpu.df11_prepare(unit.tensors(), meter.device)
    parts = tuple(found.values())
    arguments = (geometry.elements, 0, geometry.elements)
    decode = torch.ops.bitforbit.df11_decode
    same_bits(decode(*parts, *arguments).view(size.df11), matrix, "df11")
    traffic, bits = nbytes(parts) + nbytes([matrix]), 8 * nbytes(parts) / matrix.numel()
    sets = copies(parts, meter.rotations(traffic))
    return [Row("DF11 to BF16", size.df11, traffic, meter.microseconds(bound(decode, sets, *arguments)), bits)]


def embedding(meter: Meter, size: Size) -> list[Row]:
    """Rows by number."""
    matrix = weights(*size.embedding, meter.device)
    rows, cols = size.embedding
    found = gpu.pack_tiles(matrix)
    assert found is not None
    parts = tuple(found.values())
    look_up = torch.ops.bitforbit.tiles_embedding
    result = []
    for count in size.ids:
        generator = torch.Generator(meter.device).manual_seed(count)
        draws = [
            torch.randint(rows, (count,), device=meter.device, generator=generator)
            for _ in range(meter.rotations(count * cols * 4))
        ]
        same_bits(look_up(draws[0], *parts, rows, cols), matrix[draws[0]], f"{count} rows")
        calls = [lambda ids=ids: look_up(ids, *parts, rows, cols) for ids in draws]  # type: ignore[misc]
        traffic = count * cols * 2 + count * nbytes(parts) // rows
        result.append(Row("rows of tiles", (count, cols), traffic, meter.microseconds(calls)))
    return result


def measure(meter: Meter, size: Size, report: Report) -> None:
    """All of it."""
    copied = report.attempt("copy", lambda: copy(meter, size.copy_bytes))
    speed = None if copied is None else gpu_common.per_second(copied.nbytes, copied.microseconds)
    rows: list[Row] = []

    def add(made: Sequence[Row] | None) -> None:
        rows.extend(made or ())
        report.put(copy_gb_per_s=speed, rows=[row.to_json(speed) for row in rows])

    add(copied and [copied])
    for shape in size.matrices:
        matrix = weights(*shape, meter.device)
        made, packed = report.attempt(f"tiles {shape}", lambda matrix=matrix: tiles(meter, matrix)) or ([], {})
        add(made)
        add(report.attempt(f"planes {shape}", lambda matrix=matrix, packed=packed: planes(meter, matrix, packed)))
    add(report.attempt("df11", lambda: df11(meter, size)))
    add(report.attempt("rows", lambda: embedding(meter, size)))


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    lines = [
        [
            row["what"] + ("" if row["graph"] else " *"),
            " x ".join(map(str, row["shape"])),
            gpu_common.cell(row["bits_per_weight"], ".2f") if row["bits_per_weight"] else "",
            gpu_common.cell(row["microseconds"]),
            gpu_common.cell(row["gb_per_s"], ".0f"),
            gpu_common.cell(row["of_copy"], ".0%"),
        ]
        for row in result["rows"]
    ]
    headers = ["", "shape", "bits/weight", "us", "GB/s", "of a copy"]
    return table(headers, lines) + "\n* with allocations, and waiting for the result"


def main(arguments: list[str]) -> int:
    """Measure and print."""
    chosen = gpu_common.parser(__doc__).parse_args(arguments)
    report = Report(chosen.json)
    with gpu_common.meter(chosen.dry_run) as meter:
        measure(meter, TINY if chosen.dry_run else FULL, report)
    print(show(report.result))
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
