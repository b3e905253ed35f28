"""A model in memory -> the files of a native directory, written one shard after the other.

Tensors are decoded one at a time, hashed as the plain file that they would make, and coded again: coding is
deterministic, faster than the hash, and also right for tensors whose layout in the checkpoint is another one.
"""

from __future__ import annotations

import bisect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import huggingface_hub
import numpy as np
import torch

from bitforbit import __version__, tensors
from bitforbit.archive.dfloat11.stfile import library_layout
from bitforbit.archive.filesystem import sync_directory, sync_files
from bitforbit.archive.pipeline import Pipeline
from bitforbit.archive.rewrite import rewrite_config, rewrite_index
from bitforbit.archive.shard_writer import Read, ShardWriter, hash_stored
from bitforbit.codecs import registry
from bitforbit.codecs.base import Bytes
from bitforbit.errors import UsageError
from bitforbit.format.checksum import digests_of
from bitforbit.format.header import Header, parse_header
from bitforbit.format.layout import Shard, open_shard
from bitforbit.format.manifest import FileEntry, Manifest
from bitforbit.format.spec import INDEX_SUFFIX, LENGTH_BYTES, MANIFEST_NAME, SHARD_SUFFIX
from bitforbit.ops.checks import dtype_name

_CODEC = "planes"
_CONFIG = "config.json"


class Originals(Protocol):
    """The tensors of the plain checkpoint that a model stands for."""

    @property
    def shapes(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor, by name."""
        ...

    def is_compressed(self, name: str) -> bool:
        """Whether the model holds any of what this tensor is made of in compressed form."""
        ...

    def value(self, name: str) -> torch.Tensor:
        """The tensor, contiguous, in CPU memory."""
        ...


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of weight files: the libraries put the variant in different places. ``kind`` differs between them."""

    variant: str | None
    kind: str = "model"

    @property
    def stem(self) -> str:
        """``model`` or ``model.fp16``."""
        return f"{self.kind}.{self.variant}" if self.variant else self.kind

    @property
    def index(self) -> str:
        """``model.safetensors.index.json`` or ``model.safetensors.index.fp16.json``."""
        return f"{self.kind}.safetensors.index.{self.variant}.json" if self.variant else f"{self.kind}{INDEX_SUFFIX}"

    def match(self, name: str) -> bool:
        """Whether a file is one of these weight files."""
        shard = rf"{re.escape(self.stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(SHARD_SUFFIX)}"
        return name == self.index or re.fullmatch(shard, name) is not None


class ModelBytes:
    """The tensors of one shard, from the model."""

    def __init__(self, originals: Originals, header: Header, name: str) -> None:
        self._originals = originals
        self._entries = [entry for entry in header.by_offset() if entry.nbytes]
        self._begins = [entry.begin for entry in self._entries]
        self._name = name

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """See :class:`bitforbit.archive.shard_writer.TensorBytes`."""
        yield self._read

    def _read(self, out: Bytes, begin: int) -> None:
        first, last = (bisect.bisect_left(self._begins, at) for at in (begin, begin + len(out)))
        for entry in self._entries[first:last]:
            data, _, _ = tensors.to_bytes(self._originals.value(entry.name))
            np.copyto(out[entry.begin - begin : entry.end - begin], data)

    def __str__(self) -> str:
        return self._name


def write_weights(
    originals: Originals,
    staging: Path,
    names: WeightNames,
    max_shard_size: int | str,
    threads: int | None,
    counted: bool = True,
) -> list[FileEntry]:
    """Write all shards, and the index if there are several. What is plain in the model is stored plain.

    ``counted``: whether the index states the number of parameters, as transformers' does.
    """
    empty = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (dtype, shape) in originals.shapes.items()}
    plan = huggingface_hub.split_torch_state_dict_into_shards(
        empty, filename_pattern=f"{names.stem}{{suffix}}{SHARD_SUFFIX}", max_shard_size=max_shard_size
    )
    largest = max((t.numel() * t.element_size() for t in empty.values()), default=0)
    pipe = Pipeline(threads, largest, None)
    shards: dict[str, Shard] = {}
    entries = []
    for file, tensor_names in plan.filename_to_tensors.items():
        entries.append(_write_shard(originals, tensor_names, staging / file, pipe))
        shards[file] = open_shard(staging / file)
    if plan.is_sharded:
        count = {"total_parameters": sum(tensor.numel() for tensor in empty.values())} if counted else {}
        index = {
            "metadata": {**count, **plan.metadata},
            "weight_map": plan.tensor_to_filename,
        }
        text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")
        rewritten = rewrite_index(text, shards.get)
        assert rewritten is not None
        entries.append(_write(staging, names.index, rewritten, text))
    return entries


def _write_shard(originals: Originals, names: Sequence[str], path: Path, pipe: Pipeline) -> FileEntry:
    layout = [(name, dtype_name(originals.shapes[name][0]), originals.shapes[name][1]) for name in names]
    head, entries = library_layout(layout, {"format": "pt"})
    size = len(head) + (entries[-1].end if entries else 0)
    header = parse_header(head[LENGTH_BYTES:], size, str(path))

    source = ModelBytes(originals, header, path.name)
    with path.open("wb+") as out:
        digests = ShardWriter(source, header, registry.get(_CODEC, 1), originals.is_compressed, pipe).write(out)
        out.flush()
        stored = hash_stored(out.fileno())
    return FileEntry(path.name, "shard", digests.size, digests.sha256 or "", stored.size, stored.xxh3_128)


def write_others(staging: Path) -> list[FileEntry]:
    """Entries of the files that are there before the weights are; ``config.json`` is rewritten."""
    entries = []
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        data = path.read_bytes()
        name = path.relative_to(staging).as_posix()
        rewritten = rewrite_config(data, _CODEC) if name == _CONFIG else None
        entries.append(_write(staging, name, data if rewritten is None else rewritten, data))
    return entries


def _write(staging: Path, name: str, data: bytes, original: bytes) -> FileEntry:
    (staging / name).write_bytes(data)
    of_original, of_stored = digests_of(original), digests_of(data)
    changed = data != original
    return FileEntry(
        name,
        "rewritten" if changed else "copied",
        of_original.size,
        of_original.sha256 or "",
        of_stored.size,
        of_stored.xxh3_128,
        original if changed else None,
    )


def directory_for(save_directory: str | os.PathLike[str]) -> Path:
    """Where a model is saved to. Raises UsageError where there is a file in the place of the directory."""
    directory = Path(save_directory)
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: expected a directory to save to, got a file")
    return directory


def save(directory: Path, names: WeightNames, write: Callable[[Path], Sequence[FileEntry]]) -> None:
    """Have ``write`` make a model's files in a temporary directory, then move them to their places in ``directory``.

    One rename each, the manifest last. Weight files that an earlier save has left and this one has not are removed
    before that: a loader would take them for the model's.
    """
    with tempfile.TemporaryDirectory(prefix=".bitforbit-", suffix="-tmp", dir=directory) as temporary:
        staging = Path(temporary)
        entries = write(staging)
        manifest = Manifest(f"bitforbit {__version__}", (), entries)
        (staging / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        sync_files(staging)
        for entry in entries:
            (directory / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (staging / entry.path).replace(directory / entry.path)
        new = {entry.path for entry in entries}
        for path in [path for path in directory.iterdir() if names.match(path.name) and path.name not in new]:
            path.unlink()
        (staging / MANIFEST_NAME).replace(directory / MANIFEST_NAME)
        sync_directory(directory)
