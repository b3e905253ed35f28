"""DFloat11 directories back to plain safetensors, as ``save_pretrained`` would have written them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from bitforbit.archive.dfloat11 import files
from bitforbit.archive.dfloat11.read import Df11Directory, TensorInfo
from bitforbit.archive.dfloat11.stfile import library_layout
from bitforbit.archive.dfloat11.units import PatternDict

SHARD_BYTES = 5_000_000_000


def write_plain(
    src: Path,
    dst: Path,
    *,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    units: PatternDict | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Decompress a DFloat11 directory into ``dst``, an empty directory.

    One ``model.safetensors``, or several with an index if the tensors take more than ``shard_bytes``. ``config.json``
    loses its DFloat11 members; if nothing else is in it, none is written. A tied output head that the compressed
    model lacks stays out. ``progress`` is told the bytes of the result as they are done; at most one unit is held.

    Raises what :class:`Df11Directory` and its iteration raise.
    """
    directory = Df11Directory(src, shapes=shapes, units=units)
    files.require_directory(dst)
    shards = _shards(sorted(directory.tensors, key=lambda t: t.name.encode()), shard_bytes)
    stem = files.weights_stem(src)
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for file_name, shard in zip(names, shards, strict=True):
            file: BinaryIO = stack.enter_context((dst / file_name).open("wb"))
            header, entries = library_layout(((t.name, t.dtype, t.shape) for t in shard), {"format": "pt"})
            file.write(header)
            file.truncate(len(header) + (entries[-1].end if entries else 0))
            places.update((entry.name, (file, len(header) + entry.begin)) for entry in entries)
        for tensor in directory.decode(threads):
            file, offset = places[tensor.name]
            file.seek(offset)
            file.write(tensor.data.data)
            if progress is not None:
                progress(tensor.data.nbytes)
    if len(shards) > 1:
        _write_index(dst / f"{stem}.safetensors.index.json", names, shards)
    config = {key: value for key, value in directory.config.items() if key != files.CONFIG_KEY}
    if config:
        files.write_config(dst, config)
    files.copy_other_files(src, dst)


def _shards(tensors: Sequence[TensorInfo], shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_index(path: Path, names: Sequence[str], shards: Sequence[Sequence[TensorInfo]]) -> None:
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard)},
        "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
