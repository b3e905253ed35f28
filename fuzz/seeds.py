"""First inputs of every fuzz target: small, valid, and of every kind that its parser tells apart."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

SHAPES = ((1, 1), (1, 65), (17, 130), (33, 64), (3, 400))


def planes_decode() -> Iterator[bytes]:
    """See the comment at the top of planes_decode.cpp."""
    rng = random.Random(1)
    for kind in range(6):
        for mode in range(4):
            for rows, cols in SHAPES:
                # The target takes numbers from a range: low + u16 % (high - low + 1).
                sizes = struct.pack("<5H", rows - 1, cols - 1, 0, 0, rows)
                payload = b"" if mode == 0 else rng.randbytes(rows * cols % 1500)
                yield bytes([kind, mode]) + sizes + payload


def df11_decode() -> Iterator[bytes]:
    """See the comment at the top of df11_decode.cpp."""
    rng = random.Random(2)
    for mode in (0, 1):
        for weights in (1, 65, 4096, 20000):
            for flat in (0, 1):
                yield bytes([mode]) + struct.pack("<H", weights - 1) + bytes([flat, 100]) + rng.randbytes(120)


def header() -> Iterator[bytes]:
    """A mode byte and a u16 (see header.py), then a safetensors file or its header's JSON."""
    tensors: list[dict[str, object]] = [
        {},
        {"__metadata__": {"format": "pt"}},
        {"a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}},
        {
            "__metadata__": {"bitforbit": "{}"},
            "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
            "empty": {"dtype": "U8", "shape": [0, 7], "data_offsets": [4, 4]},
            "b": {"dtype": "F4", "shape": [4], "data_offsets": [4, 6]},
        },
        {
            "b": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [8, 11]},
            "a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        },
    ]
    for entries in tensors:
        text = json.dumps(entries, separators=(",", ":")).encode()
        end = max((t["data_offsets"][1] for n, t in entries.items() if n != "__metadata__"), default=0)  # type: ignore[index]
        yield b"\0\0\0" + len(text).to_bytes(8, "little") + text + bytes(end)
        yield b"\1" + struct.pack("<H", end) + text


def record() -> Iterator[bytes]:
    """A mode byte, then a record (mode 0) or a manifest (mode 1)."""
    from bitforbit.format.manifest import FileEntry, Manifest
    from bitforbit.format.record import OriginalFile, ShardRecord, TensorRecord
    from bitforbit.format.spec import RECORD_KEY

    coded = TensorRecord(
        "planes", "0" * 16, 1, "BF16", (2, 64), {"kind": "BF16", "rows": 2}, {"code": 64, "digits": 64}, "1" * 16
    )
    for tensors in ({}, {"a": TensorRecord("raw", "0" * 16)}, {"a.weight": coded, "b": TensorRecord("raw", "f" * 16)}):
        shard = ShardRecord(OriginalFile(1000, "a" * 64, "b" * 32, b'{"a":1}'), tensors)
        yield b"\0" + shard.metadata()[RECORD_KEY].encode()
    copied = FileEntry("a/b.json", "copied", 3, "c" * 64, 3, "d" * 32)
    rewritten = FileEntry("config.json", "rewritten", 2, "c" * 64, 9, "d" * 32, b"{}")
    for files in ([], [copied], [rewritten, copied]):
        yield b"\1" + Manifest("bitforbit 0.1.0", ["empty"], files).to_bytes()


def write(target: str, corpus: Path) -> None:
    """Write the first inputs of a target into its corpus."""
    corpus.mkdir(parents=True, exist_ok=True)
    generators = {"planes_decode": planes_decode, "df11_decode": df11_decode, "header": header, "record": record}
    for i, seed in enumerate(generators[target]()):
        (corpus / f"seed-{i:03}").write_bytes(seed)
