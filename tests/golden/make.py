"""How the golden files of format version 1 were made. They are never made again: old files must stay readable.

Run once per format version: ``python tests/golden/make.py DIRECTORY``.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np

import bitforbit

Tensor = tuple[str, tuple[int, ...], bytes]


def noise(n: int, seed: int) -> np.ndarray:
    """Uniform 32-bit words of a linear congruential generator, the same for ever."""
    words = np.empty(n, np.uint32)
    state = seed
    for i in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        words[i] = state >> 32
    return words


def trained(n: int, seed: int) -> np.ndarray:
    """Float32 numbers that fall off like weights: products of uniform numbers."""
    u = noise(3 * n, seed).reshape(3, n).astype(np.float64) / 2**32 - 0.5
    return (u[0] * u[1] * u[2]).astype(np.float32)


def tensors() -> dict[str, Tensor]:
    """Every float kind, edges of tiles, patterns that are no numbers, and what is kept as it is."""
    bf16 = (trained(130 * 200, 1).view(np.uint32) >> 16).astype("<u2")
    f16 = trained(64 * 96, 2).astype("<f2")
    f32 = trained(40 * 70, 3).astype("<f4")
    wide = (trained(48 * 64, 4).view(np.uint32) & 0xFFFF0000).astype("<u4")
    e4m3 = (noise(64 * 128, 5) % 40 + 40 + (noise(64 * 128, 6) % 2) * 128).astype("u1")
    e5m2 = (noise(64 * 128, 7) % 20 + 50 + (noise(64 * 128, 8) % 2) * 128).astype("u1")
    return {
        "layers.0.weight": ("BF16", (130, 200), bf16.tobytes()),
        "layers.0.bias": ("BF16", (200,), bf16[:200].tobytes()),
        "layers.1.conv.weight": ("F16", (16, 8, 6, 8), f16.tobytes()),
        "layers.2.weight": ("F32", (40, 70), f32.tobytes()),
        "layers.3.weight": ("F32", (48, 64), wide.tobytes()),
        "layers.4.weight": ("F8_E4M3", (64, 128), e4m3.tobytes()),
        "layers.5.weight": ("F8_E5M2", (64, 128), e5m2.tobytes()),
        "all_patterns": ("BF16", (256, 256), np.arange(1 << 16, dtype="<u2").tobytes()),
        "noise": ("BF16", (32, 64), noise(1024, 9).astype("<u4").tobytes()),
        "index": ("I64", (5,), np.arange(5, dtype="<i8").tobytes()),
        "scalar": ("F32", (), struct.pack("<f", 1.5)),
        "empty": ("BF16", (0, 64), b""),
        "ünïcode": ("BOOL", (3,), b"\1\0\1"),
    }


def safetensors(members: dict[str, Tensor]) -> bytes:
    """A file whose header is neither sorted nor compact."""
    header: dict[str, object] = {}
    data = b""
    for name, (dtype, shape, raw) in members.items():
        header[name] = {"shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)], "dtype": dtype}
        data += raw
    header = dict(reversed(header.items())) | {"__metadata__": {"format": "pt", "note": "golden"}}
    text = json.dumps(header, indent=1, ensure_ascii=False).encode() + b"   "
    return len(text).to_bytes(8, "little") + text + data


def main(target: Path) -> None:
    """Write ``packed``, ``array.bin`` and the checksums of what they hold."""
    model = target / "original"
    (model / "sub").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(safetensors(tensors()))
    (model / "config.json").write_text('{"model_type": "llama",\n   "hidden_size": 64}\n')
    (model / "sub" / "notes.txt").write_text("carried over\n")
    bitforbit.compress(model, target / "packed")
    sums = {p.relative_to(model).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in model.rglob("*.*")}
    array = np.frombuffer(tensors()["layers.1.conv.weight"][2], np.float16).reshape(16, 8, 6, 8)
    (target / "array.bin").write_bytes(bitforbit.encode(array).to_bytes())
    sums["array"] = hashlib.sha256(array.tobytes()).hexdigest()
    (target / "sha256.json").write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
