"""Claim: compressing or restoring a whole model takes little more than the codec and a copy, in bounded memory.

A 2 GB model (shapes of Llama-3.2-1B, Gaussian weights, four shards) is compressed, verified and restored by processes
of their own, whose peak resident memory the operating system reports. Beside them in the same run: a plain copy of the
directory with fsync, the codec alone in memory with the same number of threads, and SHA-256 alone (one file at a
time), which compression owes to the promise that every file comes back with its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import gaussian_bf16, save, table
from bitforbit import cpu
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.cpu import planes as kernels

HIDDEN, INTERMEDIATE, KV, VOCAB, LAYERS, SHARDS = 2048, 8192, 512, 128256, 12, 4


def shapes() -> list[dict[str, tuple[int, int]]]:
    """Tensor names and shapes of every shard."""
    shards: list[dict[str, tuple[int, int]]] = [{} for _ in range(SHARDS)]
    shards[0]["model.embed_tokens.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        linears = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }  # fmt: skip
        for name, shape in linears.items():
            shards[1 + layer * (SHARDS - 1) // LAYERS][f"model.layers.{layer}.{name}.weight"] = shape
    return shards


def build(directory: Path) -> None:
    """Write the model. Its weights are rows of one Gaussian pool, as drawing 10^9 numbers would take a minute."""
    pool = gaussian_bf16(16384, 2048)
    rng = np.random.default_rng(1)
    weight_map = {}
    for i, shard in enumerate(shapes()):
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor, (rows, cols) in shard.items():
            header[tensor] = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [at, at + 2 * rows * cols]}
            at += 2 * rows * cols
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for rows, cols in shard.values():
                wanted = rows * cols // 2048
                while wanted:
                    begin = int(rng.integers(0, 8192))
                    part = pool[begin : begin + min(wanted, 8192)]
                    file.write(memoryview(part).cast("B"))
                    wanted -= len(part)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "llama", "hidden_size": 2048}\n')


def in_process(expression: str) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a fresh process that evaluates a bitforbit call."""
    code = (
        "import time, bitforbit\n"
        f"t = time.perf_counter(); {expression}; t = time.perf_counter() - t\n"
        # Not ru_maxrss: that begins with the size of the process that started this one.
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(t, int(peak) / 1024)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, megabytes = out.split()
    return float(seconds), float(megabytes)


def plain_copy(src: Path, dst: Path) -> float:
    """Seconds to copy a directory's files durably."""
    begin = time.perf_counter()
    dst.mkdir()
    for path in sorted(src.iterdir()):
        with path.open("rb") as source, (dst / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(dst)
    return seconds


def codec_alone(threads: int) -> tuple[float, float]:
    """Seconds to encode and to decode all the model's matrices in memory."""
    pool = gaussian_bf16(16384, 2048)
    codec, encode_seconds, decode_seconds = PlanesCodec(), 0.0, 0.0
    for shard in shapes():
        for rows, cols in shard.values():
            data = kernels.empty(2 * rows * cols)
            words = data.view(np.uint16).reshape(-1, 2048)
            for begin in range(0, len(words), len(pool)):
                words[begin : begin + len(pool)] = pool[: len(words) - begin]
            t0 = time.perf_counter()
            encoded = codec.encode_always(data, "BF16", (rows, cols), "BF16", threads)
            t1 = time.perf_counter()
            codec.decode(encoded, data, None, threads)
            decode_seconds += time.perf_counter() - t1
            encode_seconds += t1 - t0
    return encode_seconds, decode_seconds


def sha256_alone(src: Path) -> float:
    """Seconds to hash all files, one after the other."""
    begin = time.perf_counter()
    for path in sorted(src.iterdir()):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    return time.perf_counter() - begin


def run(rounds: int = 3) -> dict[str, Any]:
    """Measure, print and save."""
    threads = cpu.default_threads()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        root = Path(temporary)
        src, packed, back = root / "model", root / "packed", root / "back"
        src.mkdir()
        build(src)
        nbytes = sum(p.stat().st_size for p in src.iterdir())
        largest = max(2 * r * c for shard in shapes() for r, c in shard.values())
        runs: dict[str, list[tuple[float, float]]] = {"compress": [], "verify": [], "decompress": []}
        copies, hashes, codecs = [], [], []
        for _ in range(rounds):
            runs["compress"].append(in_process(f"bitforbit.compress({str(src)!r}, {str(packed)!r}, overwrite=True)"))
            copies.append(plain_copy(src, root / "copy"))
            runs["verify"].append(in_process(f"assert bitforbit.verify({str(packed)!r}).ok"))
            runs["decompress"].append(
                in_process(f"bitforbit.decompress({str(packed)!r}, {str(back)!r}, overwrite=True)")
            )
            hashes.append(sha256_alone(src))
            codecs.append(codec_alone(threads))
        for path in src.iterdir():
            if path.read_bytes() != (back / path.name).read_bytes():
                raise AssertionError(f"{path.name} came back changed")
        packed_bytes = sum(p.stat().st_size for p in packed.iterdir())
    copy, sha256 = statistics.median(copies), statistics.median(hashes)
    encode, decode = (statistics.median(c[i] for c in codecs) for i in (0, 1))
    limit = (2 * largest) / 2**20 + 300
    results: dict[str, Any] = {
        "threads": threads,
        "model_bytes": nbytes,
        "compressed_bytes": packed_bytes,
        "bits_per_weight": round(16 * packed_bytes / nbytes, 4),
        "largest_tensor_bytes": largest,
        "memory_limit_mib": round(limit),
        "seconds": {"copy": copy, "sha256": sha256, "encode": encode, "decode": decode},
    }
    rows = []
    for name, samples in runs.items():
        seconds, mib = statistics.median(s for s, _ in samples), max(m for _, m in samples)
        codec = encode if name == "compress" else decode
        ratio = seconds / (codec + copy)
        results["seconds"][name] = seconds
        results[f"{name}_peak_mib"] = round(mib)
        results[f"{name}_over_codec_and_copy"] = round(ratio, 3)
        rows.append([name, f"{seconds:.2f}", f"{nbytes / seconds / 1e9:.2f}", f"{ratio:.2f}x", f"{mib:.0f}"])
    print(f"\n{nbytes / 1e9:.2f} GB model, {threads} threads, {results['bits_per_weight']:.3f} bits/weight on disk")
    print(f"copy with fsync {copy:.2f} s, SHA-256 {sha256:.2f} s, encode {encode:.2f} s, decode {decode:.2f} s; ")
    print(f"memory limit (2 x largest tensor + 300 MiB): {limit:.0f} MiB\n")
    print(table(["", "seconds", "GB/s", "over codec + copy", "peak MiB"], rows))
    save("archive", results)
    return results


if __name__ == "__main__":
    run()
