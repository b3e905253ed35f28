"""Compressed sizes are tracked: a change of a byte shows, and is made on purpose by editing sizes.csv."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np

from bitforbit.codecs.planes import PlanesCodec

HERE = Path(__file__).parent


def load_golden() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors of the golden files."""
    spec = importlib.util.spec_from_file_location("golden_make", HERE.parent / "golden" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = module.tensors()
    weights = module.trained(256 * 1024, 11)
    tensors["trained 256 x 1024"] = ("BF16", (256, 1024), (weights.view(np.uint32) >> 16).astype("<u2").tobytes())
    return tensors


def test_sizes() -> None:
    codec = PlanesCodec()
    got = {}
    for name, (dtype, shape, raw) in load_golden().items():
        if dtype[0] in "BF" and dtype != "BOOL" and raw:
            encoded = codec.encode(np.frombuffer(raw, np.uint8), dtype, shape, 1)
            got[name] = (dtype, len(raw), len(raw) if encoded is None else encoded.nbytes)
    with (HERE / "sizes.csv").open() as file:
        rows = list(csv.DictReader(file))
    tracked = {row["tensor"]: (row["dtype"], int(row["original_bytes"]), int(row["stored_bytes"])) for row in rows}
    assert got == tracked
