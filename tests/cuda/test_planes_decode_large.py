"""Addresses beyond 4 GiB: a matrix of over 2^32 weights, of which memory holds only the last block's pages."""

from __future__ import annotations

import mmap

import numpy as np

from bitforbit.codecs.planes.layout import BLOCK_ROWS, TABLE_BYTES, Layout
from bitforbit.cuda.planes import decode
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from helpers.device_planes import Case, encoded, hostile_bytes

COLS = 4096
BLOCKS = 70_000
MAP_NORESERVE = 0x4000  # Linux


class Sparse:
    """Zeros, as many as asked for; pages become memory when they are touched."""

    def __init__(self, nbytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, nbytes + mmap.PAGESIZE, flags=flags)
        self.array = np.frombuffer(self._map, np.uint8)[:nbytes]
        self.address = self.array.ctypes.data


def test_last_rows_of_more_than_2_to_32_weights() -> None:
    queue = EmulatedQueue(EmulatedLauncher(3))
    data = hostile_bytes("BF16", False, BLOCK_ROWS * COLS, 1, "zeros")
    tensor = encoded(data, "BF16", False, BLOCK_ROWS, COLS, BLOCK_ROWS)
    small = Case(queue, tensor)
    layout = Layout("BF16", BLOCK_ROWS * BLOCKS, COLS, BLOCK_ROWS)
    assert layout.rows * layout.cols > 1 << 32

    # The small matrix is the last block; its tail begins behind 5 GB that belong to the others.
    tails_before = 5_000_000_064
    sizes = layout.part_bytes(tails_before + tensor.parts["tails"].size)
    parts = {name: Sparse(nbytes) for name, nbytes in sizes.items()}
    for name in ("digits", "sign_mantissa", "tails"):
        parts[name].array[-tensor.parts[name].size :] = tensor.parts[name]
    parts["code"].array[(BLOCKS - 1) * TABLE_BYTES :][:TABLE_BYTES] = tensor.parts["code"][:TABLE_BYTES]

    # And what preparing would leave for it.
    prepared = np.frombuffer(queue.download(small.workspace), np.uint8)
    workspace = Sparse(decode.workspace_bytes(layout))
    starts = prepared[: decode.START_BYTES].view(np.uint64) + np.array([*[tails_before] * 3, BLOCKS - 1], np.uint64)
    workspace.array[(BLOCKS - 1) * decode.START_BYTES :][: decode.START_BYTES] = starts.view(np.uint8)
    entries = prepared[decode.START_BYTES :]
    workspace.array[-entries.size :] = entries

    begin, out = layout.rows - 9, queue.empty(9 * 2 * COLS)
    addresses = [(part.address, part.array.size) for part in parts.values()]
    decode.decode(queue, addresses, layout, False, begin, layout.rows, out.address, workspace.address)
    assert queue.download(out) == data[-9 * 2 * COLS :].tobytes()
    ids = queue.upload(np.array([layout.rows - 1, layout.rows], np.int64).tobytes())
    chosen, status = queue.empty(2 * 2 * COLS), queue.zeros(4)
    decode.rows(
        queue, addresses, layout, False, ids.address, 8, 2, chosen.address, workspace.address, status.address
    )  # fmt: skip
    assert queue.download(chosen) == data[-2 * COLS :].tobytes() + bytes(2 * COLS)
    assert queue.download(status) == b"\2\0\0\0"
