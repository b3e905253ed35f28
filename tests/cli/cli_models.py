"""Small models for the command line's tests."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs ``bitforbit ARGUMENTS`` in a process of its own; keywords are environment variables."""

BF16 = np.dtype(ml_dtypes.bfloat16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    names = {"bfloat16": "BF16", "float32": "F32", "int64": "I64"}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in tensors.items():
        end = at + array.nbytes
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))


def write_model(directory: Path, layers: int = 2, hidden: int = 128, vocabulary: int = 512) -> Path:
    """A directory like that of a small Llama, in two shards, with Gaussian weights."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.03).astype(BF16)

    directory.mkdir(parents=True)
    first: dict[str, np.ndarray] = {"model.embed_tokens.weight": weight(vocabulary, hidden)}
    second: dict[str, np.ndarray] = {}
    for i in range(layers):
        shard = first if i < layers // 2 else second
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            shard[f"model.layers.{i}.{name}.weight"] = weight(hidden, hidden)
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            shard[f"model.layers.{i}.{name}.weight"] = weight(2 * hidden, hidden)
        shard[f"model.layers.{i}.mlp.down_proj.weight"] = weight(hidden, 2 * hidden)
        shard[f"model.layers.{i}.input_layernorm.weight"] = np.ones(hidden, BF16)
    second["model.norm.weight"] = np.ones(hidden, BF16)
    second["lm_head.weight"] = weight(vocabulary, hidden)
    weight_map = {}
    for i, shard in enumerate((first, second), 1):
        name = f"model-{i:05d}-of-00002.safetensors"
        write_safetensors(directory / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(a.nbytes for shard in (first, second) for a in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return directory


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file by relative path."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def one_object(text: str) -> dict[str, object]:
    """The one JSON object, on one line, that a command printed."""
    value = json.loads(text)
    assert isinstance(value, dict)
    assert text.count("\n") == 1
    return value
