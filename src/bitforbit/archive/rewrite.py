"""The two kinds of JSON files that a compressed model changes (docs/format.md, section 4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitforbit.format.layout import Shard
from bitforbit.format.spec import FORMAT_VERSION, MAX_HEADER_BYTES, QUANT_METHOD


def load_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if it holds anything else or is absurdly large."""
    if path.stat().st_size > MAX_HEADER_BYTES:
        return None
    return parse_object(path.read_bytes())


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in a text, None if it holds anything else. Reads Infinity and NaN, which real configs have."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode("ascii")


def rewrite_config(original: bytes, codec: str) -> bytes | None:
    """``config.json`` with a ``quantization_config`` for bitforbit; None if it is no JSON object."""
    config = parse_object(original)
    if config is None:
        return None
    quantization: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "codec": codec}
    if "quantization_config" in config:
        quantization["base"] = config["quantization_config"]
    return _text({**config, "quantization_config": quantization})


def rewrite_index(original: bytes, shard_of: Callable[[str], Shard | None]) -> bytes | None:
    """An index that names the stored tensors; None if it is no index.

    ``shard_of`` maps a file name of the index to that shard, None if there is none.
    """
    index = parse_object(original)
    weight_map = None if index is None else index.get("weight_map")
    if index is None or not isinstance(weight_map, dict):
        return None
    stored: dict[str, Any] = {}
    shards: dict[str, Shard | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            return None
        if file not in shards:
            shards[file] = shard_of(file)
        shard = shards[file]
        known = shard is not None and name in shard.record.tensors
        names = shard.stored_names(name) if shard is not None and known else [name]
        stored.update(dict.fromkeys(names, file))
    result = {**index, "weight_map": stored}
    if isinstance(index.get("metadata"), dict):
        total = sum(s.header.file_size - s.header.data_start for s in shards.values() if s is not None)
        result["metadata"] = {**index["metadata"], "total_size": total}
    return _text(result)
