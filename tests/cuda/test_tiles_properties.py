"""Matrices of any shape and any exponents go to the device and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitforbit.cuda.tiles import naive, pack
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from helpers.device_tiles import DeviceTiles
from helpers.tile_cases import with_exponents


@given(
    rows=st.integers(1, 50),
    cols=st.integers(1, 200),
    exponents=st.lists(st.integers(0, 255), min_size=1, max_size=120),
    seed=st.integers(0, 20),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_matrix(rows: int, cols: int, exponents: list[int], seed: int, data: st.DataObject) -> None:
    words = with_exponents(rows, cols, exponents, seed)
    begin = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(begin, rows))
    queue = EmulatedQueue(EmulatedLauncher(seed))
    expected = naive.pack(words)
    np.testing.assert_array_equal(naive.decode(expected, TileLayout(rows, cols)), words)
    tiles = DeviceTiles(queue, expected, rows, cols)
    np.testing.assert_array_equal(tiles.decode(begin, end), words[begin:end])
    ids = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), np.int64)
    np.testing.assert_array_equal(tiles.rows(ids)[0], words[ids])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TileLayout, "nbytes", lambda *_: 0)  # whether it gains is not the question here
        source = queue.upload(words.tobytes())
        packed = pack.pack(queue, source.address, rows, cols)
    assert packed is not None
    assert all(queue.download(packed[part]) == expected[part].tobytes() for part in PARTS)
