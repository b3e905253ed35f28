"""Encoded matrices are cut on the GPU: rows are decoded there and encoded anew, with the bytes that the CPU gives."""

from __future__ import annotations

import numpy as np
import pytest

from bitforbit import dtypes
from bitforbit.codecs.planes.layout import Layout
from bitforbit.cpu import planes as native
from bitforbit.cuda.planes import decode, encode
from bitforbit.cuda.queue import Queue


@pytest.mark.parametrize(("kind", "wide"), list(encode.KINDS))
def test_row_ranges_are_encoded_anew(queue: Queue, kind: str, wide: bool) -> None:
    rows, cols = 90, 200
    layout = dtypes.FLOAT_LAYOUTS[kind]
    rng = np.random.default_rng(5)
    exponents = np.clip((1 << layout.exponent_bits) // 2 - rng.geometric(0.4, rows * cols), 0, None).astype(np.uint32)
    rest = rng.integers(0, 1 << (1 + layout.mantissa_bits), rows * cols).astype(np.uint32)
    words = dtypes.join(exponents, rest, layout)
    data = (words.astype("<u4") << 16 if wide else words.astype(f"<u{layout.itemsize}")).reshape(rows, cols)

    matrix = queue.upload(data.tobytes())
    whole = encode.encode(queue, matrix.address, kind, wide, rows, cols, always=True)
    assert whole is not None
    geometry = Layout(kind, rows, cols, whole[0])
    parts = [(part.address, part.nbytes) for part in whole[1].values()]
    workspace, status = queue.empty(decode.workspace_bytes(geometry)), queue.zeros(4)
    decode.prepare(queue, parts, geometry, workspace.address, status.address)
    for begin, end in ((0, 90), (0, 30), (30, 60), (59, 61)):
        shard = queue.empty((end - begin) * cols * data.itemsize)
        decode.decode(queue, parts, geometry, wide, begin, end, shard.address, workspace.address, status.address)
        found = encode.encode(queue, shard.address, kind, wide, end - begin, cols, always=True)
        assert found is not None
        cut = np.frombuffer(data[begin:end].tobytes(), np.uint8)
        expected = native.encode(cut, kind, wide, end - begin, cols, 0, 1)
        assert found[0] == expected[0]
        for name, part in expected[1].items():
            np.testing.assert_array_equal(np.frombuffer(queue.download(found[1][name]), np.uint8), part, name)
    assert not any(queue.download(status))
