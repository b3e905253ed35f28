"""Builders of safetensors files and model directories, by hand: also of ones that no library would write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitforbit import dtypes

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype, shape, bytes."""


def gaussian(shape: tuple[int, ...], seed: int = 0, dtype: str = "BF16") -> Tensor:
    """Weights of a usual spread, as truncated floats of the dtype."""
    values = (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)
    return dtype, shape, values.astype(dtypes.to_numpy(dtype)).tobytes()


def noise(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bits: every pattern, NaN payloads and subnormals included."""
    nbytes = dtypes.bits(dtype) * int(np.prod(shape, dtype=np.int64)) // 8
    return dtype, shape, np.random.default_rng(seed).bytes(nbytes)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A regular file, its tensors laid out in the given order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(json.dumps(header).encode(), data)


def with_header(text: bytes, data: bytes) -> bytes:
    """A file with that header text, right or wrong."""
    return len(text).to_bytes(8, "little") + text + data


def split_file(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Parsed header and data of a file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def layer(i: int, dim: int = 96) -> dict[str, Tensor]:
    """Tensors of one made-up layer."""
    return {
        f"model.layers.{i}.proj.weight": gaussian((dim, dim + 32), i),
        f"model.layers.{i}.norm.weight": ("F32", (dim,), np.ones(dim, np.float32).tobytes()),
        f"model.layers.{i}.mlp.weight": gaussian((2 * dim, dim), 100 + i),
        f"model.layers.{i}.ids": ("I64", (3,), np.arange(3).tobytes()),
    }


def build_model(root: Path, shards: int = 2, dim: int = 96) -> Path:
    """A sharded model directory as transformers writes it, and some files beside."""
    root.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        tensors = layer(i, dim)
        (root / name).write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(len(t[2]) for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (root / "config.json").write_text('{\n  "model_type": "llama",\n  "hidden_size": 96\n}')
    (root / "tokenizer.json").write_bytes(b'{"version": "1.0"}' * 50)
    (root / "README.md").write_text("no weights here\n")
    (root / "empty" / "inner").mkdir(parents=True)
    return root
