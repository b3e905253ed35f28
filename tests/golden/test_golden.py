"""Files of every format version that was ever released decode to the same bytes for ever."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import bitforbit
from bitforbit import cpu

HERE = Path(__file__).parent
ISAS = [name for name, supported in cpu.implementations().items() if supported]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("version", ["1"])
def test_golden_directory(version: str, isa: str, tmp_path: Path) -> None:
    expected = json.loads((HERE / version / "sha256.json").read_text())
    with cpu.force(isa):
        assert bitforbit.verify(HERE / version / "packed").ok
        bitforbit.decompress(HERE / version / "packed", tmp_path / "restored")
        array = bitforbit.Encoded.from_bytes((HERE / version / "array.bin").read_bytes()).decode()
    restored = {
        path.relative_to(tmp_path / "restored").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "restored").rglob("*")
        if path.is_file()
    }
    restored["array"] = hashlib.sha256(array.tobytes()).hexdigest()
    assert restored == expected
