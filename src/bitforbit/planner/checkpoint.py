"""A model from a config.json, or from a directory: headers only, no weight is read.

Of a directory the headers say what the model consists of, whatever its family; of one that bitforbit compressed they
also say how many bytes each tensor takes. A DFloat11 directory gives its family's matrices and the files' size.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitforbit.archive.compressed import is_compressed, open_compressed
from bitforbit.archive.rewrite import load_object
from bitforbit.archive.source import check_plain, scan
from bitforbit.errors import PlanError, SourceNotFoundError
from bitforbit.format.header import TensorEntry, read_header
from bitforbit.planner import families
from bitforbit.planner.shapes import ITEM_BYTES, Dimensions, Layer, Matrix, Shape, optional, text_config

_LAYER = re.compile(r"(?P<prefix>.*?(?:layers|blocks|h|layer|block)\.)(?P<index>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"experts\.\d+\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
_KEYS_VALUES = re.compile(r"\b(?:k_proj|v_proj|key|value)\.weight$")
_DOWN = re.compile(r"down_proj|fc2|dense_4h_to_h|\bw2\b|c_proj")
_MLP = re.compile(r"mlp|experts|feed_forward|ffn|fc1|fc2")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the original checkpoint; ``stored``: bytes in the compressed one, None if there is none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: int | None = None


def read_shape(path: Path) -> Shape:
    """The model of a ``config.json`` or of a directory. Raises PlanError, SourceNotFoundError or FormatError."""
    if path.is_file() and path.suffix == ".json":
        return families.from_config(_config(path))
    if not path.is_dir():
        if path.exists():
            raise PlanError(f"{path}: expected a model directory or a config.json, got a file of another kind")
        raise SourceNotFoundError(f"{path}: no such file or directory")
    config = _config(path / "config.json")
    if "dfloat11_config" in config:
        return _dfloat11(path, config)
    tensors = _tensors(path)
    if not tensors:
        return families.from_config(config)
    return from_tensors(config, tensors)


def from_tensors(config: Mapping[str, Any], tensors: list[Tensor]) -> Shape:
    """The model whose checkpoint has these tensors. Raises PlanError."""
    d = Dimensions.from_config(config)
    text = text_config(config)
    matrices = [t for t in tensors if len(t.shape) >= 2 and t.dtype in ITEM_BYTES]
    if not matrices:
        raise PlanError("expected a checkpoint with matrices in BF16, FP16, FP32 or FP8, got none")
    d = replace(d, dtype=_main_dtype(matrices))
    prefix = _text_prefix(matrices, d.layers)
    inside: dict[int, list[Tensor]] = defaultdict(list)
    ends: dict[str, Tensor] = {}
    beside: list[Tensor] = []
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match and match["prefix"] == prefix and int(match["index"]) < d.layers:
            inside[int(match["index"])].append(replace(tensor, name=match["rest"]))
        elif _EMBEDDING.search(tensor.name) and tensor.shape == (d.vocab, d.hidden) and "embedding" not in ends:
            ends["embedding"] = tensor
        elif _HEAD.search(tensor.name) and tensor.shape == (d.vocab, d.hidden) and "head" not in ends:
            ends["head"] = tensor
        else:
            beside.append(tensor)
    if "embedding" not in ends or len(inside) != d.layers:
        raise PlanError(
            f"expected an embedding [{d.vocab}, {d.hidden}] and {d.layers} layers, as config.json says, got "
            f"{'one' if 'embedding' in ends else 'none'} and {len(inside)}; are files missing?"
        )
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    layers = tuple(_layer(inside[i], text, i) for i in range(d.layers))
    stored = [t for t in matrices if t.stored is not None]
    bits = 8 * sum(t.stored or 0 for t in stored) / sum(_elements(t) for t in stored) if stored else None
    stacked = [t for t in beside if len(t.shape) >= 2]
    return Shape(
        str(text.get("model_type", "model")),
        d,
        _matrix("embedding", ends["embedding"]),
        layers,
        _matrix("head", ends["head"]) if "head" in ends and not tied else None,
        vectors=sum(_elements(t) for t in beside if len(t.shape) < 2),
        other=tuple(_matrix(t.name, t) for t in stacked),
        notes=("what lies beside the text model is counted on the first GPU",) if stacked else (),
        sizes_from="headers of the safetensors files",
        compressed_bits=bits,
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = load_object(path)
    except OSError as e:
        raise SourceNotFoundError(f"{path}: expected the model's config.json, got {e.strerror or e}") from None
    if config is None:
        raise PlanError(f"{path}: expected a JSON object, as config.json is, got something else")
    return config


def _tensors(path: Path) -> list[Tensor]:
    if is_compressed(path):
        shards = open_compressed(path).open_shards().values()
        return [_tensor(e, shard.stored_bytes(e)) for shard in shards for e in shard.original.tensors]
    if not any(path.glob("*.safetensors")):
        return []
    return [_tensor(e, None) for header in check_plain(scan(path)).values() for e in header.tensors]


def _tensor(entry: TensorEntry, stored: int | None) -> Tensor:
    return Tensor(entry.name, entry.shape, entry.dtype, stored)


def _dfloat11(path: Path, config: Mapping[str, Any]) -> Shape:
    shape = families.from_config(config)
    files = [read_header(file) for file in sorted(path.glob("*.safetensors"))]
    stored = sum(header.file_size for header in files)
    if not stored:
        return shape
    return replace(shape, df11_bits=8 * stored / shape.parameters, sizes_from="config.json and the files' size")


def _main_dtype(matrices: list[Tensor]) -> str:
    elements: dict[str, int] = defaultdict(int)
    for tensor in matrices:
        elements[tensor.dtype] += _elements(tensor)
    return max(elements, key=lambda dtype: elements[dtype])


def _text_prefix(matrices: list[Tensor], layers: int) -> str:
    """Of names such as ``model.layers.7.mlp.up_proj.weight`` what is before the number: the one with most weights."""
    elements: dict[str, int] = defaultdict(int)
    indices: dict[str, set[int]] = defaultdict(set)
    for tensor in matrices:
        match = _LAYER.fullmatch(tensor.name)
        if match:
            elements[match["prefix"]] += _elements(tensor)
            indices[match["prefix"]].add(int(match["index"]))
    fitting = [prefix for prefix in elements if len(indices[prefix]) >= layers]
    return max(fitting, key=lambda prefix: elements[prefix], default="")


def _layer(tensors: list[Tensor], config: Mapping[str, Any], index: int) -> Layer:
    stacks: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if len(tensor.shape) >= 2:
            name = _EXPERT.sub("experts.*.", tensor.name)
            if "experts.*." in name or re.search(r"experts\.[a-z_0-9]+$", name):
                name = "experts.down" if _DOWN.search(name) else "experts.up"
            stacks[name].append(tensor)
    experts = optional(config, "num_local_experts", "num_experts") or 1
    used = min(1.0, (optional(config, "num_experts_per_tok") or 1) / experts)
    matrices = [
        _stack(name, members, experts, used) if name.startswith("experts.") else _matrix(_role(name), members[0])
        for name, members in stacks.items()
    ]
    vectors = sum(_elements(t) for t in tensors if len(t.shape) < 2)
    return Layer(tuple(matrices), vectors, families.window(config, index))


def _role(name: str) -> str:
    if _KEYS_VALUES.search(name):
        return "kv"
    if _MLP.search(name) and not name.endswith(("gate.weight", "router.weight")):
        return "mlp.down" if _DOWN.search(name) else "mlp.up"
    return name.removesuffix(".weight")


def _matrix(name: str, tensor: Tensor) -> Matrix:
    cols = tensor.shape[-1]
    rows = _elements(tensor) // cols if cols else 0
    return Matrix(name, rows, cols, heads=name == "kv", stored=tensor.stored)


def _stack(name: str, members: list[Tensor], experts: int, used: float) -> Matrix:
    """Experts of a layer, gate and up in one as transformers keeps them."""
    elements = sum(_elements(t) for t in members)
    cols = members[0].shape[-1]
    stored = None if any(t.stored is None for t in members) else sum(t.stored or 0 for t in members)
    rows = elements // (experts * cols)
    return Matrix(f"mlp.{name.partition('.')[2]}", rows, cols, experts, used, stored=stored)


def _elements(tensor: Tensor) -> int:
    count = 1
    for dim in tensor.shape:
        count *= dim
    return count
