"""Tiles on a real GPU at the sizes of real models, and beyond 2^32 weights."""

from __future__ import annotations

from typing import Any

import pytest

from bitforbit.cuda.tiles import decode, kinds, pack
from bitforbit.cuda.tiles.layout import PARTS, TILE_WEIGHTS, TileLayout
from helpers.gpu_queue import GpuQueue

torch = pytest.importorskip("torch")

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}

# Llama-3.1-8B's linears and vocabulary; columns that are no multiple of 8; more weights than 32 bits count.
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (128_256, 4096), (50_257, 769), ((1 << 20) + 5, 4099)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_large_matrices(rows: int, cols: int) -> None:
    if torch.cuda.mem_get_info()[0] < 6 * rows * cols + (1 << 30):
        pytest.skip("too little memory free")
    with GpuQueue() as queue:
        assert 11.1 < round_trip(queue, rows, cols, "cuda:0") < 11.3
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("name", "least", "most"), [("F16", 14.1, 14.3), ("F8_E4M3", 7.0, 7.5)])
@pytest.mark.parametrize(("rows", "cols"), SHAPES[:5])
def test_large_matrices_of_other_kinds(rows: int, cols: int, name: str, least: float, most: float) -> None:
    with GpuQueue() as queue:
        assert least < round_trip(queue, rows, cols, "cuda:0", kinds.of(name)) < most
    torch.cuda.empty_cache()


def round_trip(queue: Any, rows: int, cols: int, device: str, kind: kinds.Kind = kinds.BF16) -> float:
    """Pack Gaussian weights, decode all, some, and rows by number; bits per weight of filled-up tiles."""
    weights = torch.empty(rows, cols, dtype=torch.bfloat16, device=device).normal_(0, 0.02).to(DTYPES[kind.name])
    bits = torch.uint8 if kind.item_bytes == 1 else torch.int16
    ids = torch.tensor([rows - 1, 0, rows // 2, rows - 1], device=device)
    synchronize(device)
    buffers = pack.pack(queue, weights.data_ptr(), rows, cols, kind)
    assert buffers is not None
    parts = [(buffers[name].address, buffers[name].nbytes) for name in PARTS]
    layout = TileLayout(rows, cols, kind)
    out = torch.empty_like(weights)
    synchronize(device)
    decode.decode(queue, parts, layout, 0, rows, out.data_ptr())
    queue.download(buffers["header"])  # waits
    assert torch.equal(out.view(bits), weights.view(bits))
    begin, end = rows - rows // 3, rows - 1
    decode.decode(queue, parts, layout, begin, end, out.data_ptr())
    queue.download(buffers["header"])
    assert torch.equal(out[: end - begin].view(bits), weights[begin:end].view(bits))
    decode.rows(queue, parts, layout, ids.data_ptr(), 8, 4, out.data_ptr())
    queue.download(buffers["header"])
    assert torch.equal(out[:4].view(bits), weights.view(bits)[ids])
    return 8 * sum(nbytes for _, nbytes in parts) / (layout.tiles * TILE_WEIGHTS)


def synchronize(device: str) -> None:
    """Torch works in a stream of its own."""
    if device != "cpu":
        torch.cuda.synchronize()
