"""What the files of a compressed checkpoint hold, tensor by tensor, under the names of the original checkpoint.

Two kinds: native shards, whose records say everything, and DFloat11 directories, read unit by unit. An ordinary
checkpoint has no source: transformers reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bitforbit import dtypes, tensors
from bitforbit.archive.buffers import aligned_buffer, read_exactly
from bitforbit.archive.dfloat11.read import Df11Directory, RestoredTensor, TensorInfo
from bitforbit.archive.pipeline import Pipeline
from bitforbit.archive.ranges import Region, file_reader, read_plain
from bitforbit.archive.shard_reader import ShardReader
from bitforbit.codecs.base import Bytes
from bitforbit.errors import ChecksumError, MissingPartError, NotCompressedError, UnsupportedDtypeError, UsageError
from bitforbit.format import checksum
from bitforbit.format.header import Header, TensorEntry, read_header
from bitforbit.format.layout import Shard, is_shard, open_shard
from bitforbit.format.manifest import read_manifest
from bitforbit.format.record import TensorRecord
from bitforbit.format.spec import INDEX_SUFFIX, MANIFEST_NAME, SHARD_SUFFIX, part_name

DF11_CONFIG = "dfloat11_config"

_MARK = ".luts"
"""Suffix of the smallest tensor of a DFloat11 unit."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, array_name) for array_name, name in dtypes.ARRAY_NAMES.items() if hasattr(torch, array_name)
}
"""torch dtype of every safetensors dtype that torch has."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the original checkpoint. ``unit`` names what it is restored from; None for plain tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: str | None


class Source(Protocol):
    """A compressed checkpoint.

    A *unit* is restored as a whole: one tensor (native), or all matrices that share a code (DFloat11). It is known by
    its *anchor*, the name of one of its stored tensors, a small one.
    """

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the original checkpoint, by name."""
        ...

    @property
    def anchors(self) -> Mapping[str, Sequence[str]]:
        """Anchor of every unit -> names of the tensors restored from it, in order."""
        ...

    @property
    def consumed(self) -> Mapping[str, Sequence[str]]:
        """Anchor of every unit -> names of the stored tensors that belong to it, the anchor among them."""
        ...

    def restore(self, anchor: str) -> dict[str, torch.Tensor]:
        """The tensors of a unit, by original name. Raises a FormatError that names file and tensor."""
        ...


class NativeSource:
    """The shards of a native directory, and shards without a record among them, whose tensors are plain.

    Raises FormatError for damaged or incomplete shards, UnsupportedVersionError for those of a newer release.
    """

    def __init__(self, headers: Mapping[Path, Header], threads: int | None) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.anchors: dict[str, Sequence[str]] = {}
        self.consumed: dict[str, Sequence[str]] = {}
        self._shards: dict[str, Shard] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._readers: dict[Path, ShardReader] = {}
        self._plain: dict[str, tuple[Path, int]] = {}
        largest = max((e.nbytes for header in headers.values() for e in header.tensors), default=0)
        pipe = Pipeline(threads, largest, None)
        for path, header in headers.items():
            if is_shard(header):
                self._add_shard(path, pipe)
            else:
                for e in header.tensors:
                    self.tensors[e.name] = StoredTensor(e.name, e.dtype, e.shape, None)
                    self._plain[e.name] = path, header.data_start + e.begin

    def _add_shard(self, path: Path, pipe: Pipeline) -> None:
        shard = open_shard(path)
        self._readers[path] = ShardReader(shard, pipe)
        for entry in shard.original.tensors:
            record = shard.record.tensors[entry.name]
            parts = [part_name(entry.name, part) for part in record.parts]
            anchor = None if record.is_raw else parts[0]
            self.tensors[entry.name] = StoredTensor(entry.name, entry.dtype, entry.shape, anchor)
            self._shards[entry.name] = shard
            self._entries[entry.name] = entry
            if anchor is not None:
                self.anchors[anchor] = (entry.name,)
                self.consumed[anchor] = parts

    def record(self, name: str) -> TensorRecord:
        """How a compressed tensor is stored."""
        return self._shards[name].record.tensors[name]

    def restore(self, anchor: str) -> dict[str, torch.Tensor]:
        """See :class:`Source`; checks both checksums of the record."""
        (name,) = self.anchors[anchor]
        shard = self._shards[name]
        record, reader = self.record(name), self._readers[shard.path]
        out = tensors.empty("torch", record.dtype, record.shape)
        with reader.opened() as fd:
            reader.tensor(fd, self._entries[name], tensors.writable_bytes(out, record.dtype, record.shape))
        return {name: out}

    def restore_slice(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        *,
        check: bool = False,
    ) -> torch.Tensor:
        """Part of a tensor, contiguous: rows [begin, end) of its first dimension, columns [begin, end) of its last.

        Reads only the bytes of the rows asked for, unless ``check``, which reads all of them into memory and compares
        the checksum of the stored bytes; files without a record have none. Works for plain tensors too. Raises
        UsageError for a range outside and for names that no file has, and what ``restore`` raises.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise UsageError(f"expected the name of a tensor of the checkpoint, got {name!r}")
        if stored.dtype not in TORCH_DTYPES:
            raise UnsupportedDtypeError(f"tensor {name!r}: torch has no dtype for {stored.dtype}")
        region = Region.of(stored.dtype, stored.shape, rows, columns)
        out = tensors.empty("torch", stored.dtype, region.shape)
        data = tensors.writable_bytes(out, stored.dtype, region.shape)
        if name in self._plain:
            path, at = self._plain[name]
            with path.open("rb", buffering=0) as file:
                read_plain(file_reader(file.fileno(), at, f"{path}, tensor {name!r}"), region, data)
            return out
        reader = self._readers[self._shards[name].path]
        with reader.opened() as fd:
            reader.part(fd, self._entries[name], region, data, check=check)
        return out

    def check(self, name: str, parts: Sequence[torch.Tensor]) -> None:
        """Compare the parts of a tensor, as they are in memory, with the record. Raises ChecksumError.

        Parts that are not in CPU memory, on a GPU or in the file until they are used, are read from there.
        """
        shard = self._shards[name]
        where = f"{shard.path}, tensor {name!r}"
        if not all(part.is_cpu for part in parts):
            stored = aligned_buffer(self.record(name).stored_bytes)
            with self._readers[shard.path].opened() as fd:
                read_exactly(fd, stored, shard.header.data_start + shard.begin[name], where)
            got = checksum.xxh3_64([stored])
        else:
            got = checksum.xxh3_64([_bytes(part) for part in parts])
        expected = self.record(name).xxh3_stored
        if got != expected:
            raise ChecksumError(
                f"{where}: expected the checksum of the stored bytes to be {expected}, got {got}; "
                "the file is damaged, fetch it again"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeSource:
        return self


class Df11Source:
    """A DFloat11 directory.

    Raises what :class:`bitforbit.archive.dfloat11.Df11Directory` raises, and MissingPartError where only some of its
    files are there.
    """

    def __init__(self, directory: Path, threads: int, shapes: Mapping[str, Sequence[int]]) -> None:
        """``shapes`` are those of the matrices by name: the files state sizes only."""
        try:
            self._directory = Df11Directory(directory, shapes=shapes)
        except NotCompressedError as e:
            raise MissingPartError(
                f"{e}; from the Hub, fetch all files first (huggingface_hub.snapshot_download) and load that directory"
            ) from None
        self._threads = threads
        self._plain: dict[str, TensorInfo] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.anchors: dict[str, Sequence[str]] = {}
        self.consumed: dict[str, Sequence[str]] = {}
        for unit, names in self._directory.units.items():
            anchor = _anchor(unit)
            self.anchors[anchor] = names
            self.consumed[anchor] = self._directory.stored_names(unit)
        unit_of = {name: anchor for anchor, names in self.anchors.items() for name in names}
        for info in self._directory.tensors:
            if info.name not in unit_of and len(info.shape) >= 2 and info.dtype in dtypes.FLOAT_LAYOUTS:
                # A matrix that DFloat11 leaves plain is a unit of its own, to be compressed like the others.
                self._plain[info.name] = info
                self.anchors[info.name] = self.consumed[info.name] = (info.name,)
                unit_of[info.name] = info.name
            self.tensors[info.name] = StoredTensor(info.name, info.dtype, info.shape, unit_of.get(info.name))

    def restore(self, anchor: str) -> dict[str, torch.Tensor]:
        """See :class:`Source`."""
        if anchor in self._plain:
            restored = [self._directory.plain_tensor(self._plain[anchor])]
        else:
            restored = list(self._directory.decode_unit(anchor.removesuffix(_MARK), self._threads))
        return {t.name: _tensor(t) for t in restored}

    def unit(self, anchor: str) -> dict[str, Bytes] | None:
        """The arrays that code a unit, as they are stored, by suffix; None if this is a plain matrix's anchor."""
        if anchor in self._plain:
            return None
        unit = self._directory.stored_unit(anchor.removesuffix(_MARK))
        names = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
        return {name: getattr(unit, name) for name in names}

    def __deepcopy__(self, memo: dict[int, Any]) -> Df11Source:
        return self


def _tensor(restored: RestoredTensor) -> torch.Tensor:
    data = restored.data if restored.data.flags.writeable else restored.data.copy()
    return torch.from_numpy(data).view(TORCH_DTYPES[restored.dtype]).reshape(restored.shape)


def _anchor(unit: str) -> str:
    return f"{unit}{_MARK}"


def _bytes(part: torch.Tensor) -> Bytes:
    array: Bytes = part.detach().numpy().reshape(-1).view(np.uint8)
    return array


def native_source(files: Iterable[str], threads: int | None) -> NativeSource | None:
    """The source of these checkpoint files; None if none of them was compressed by bitforbit.

    Raises what NativeSource raises, and MissingPartError if the manifest or the index beside them names files or
    tensors that are not among them.
    """
    paths = [Path(file) for file in files if file.endswith(SHARD_SUFFIX)]
    headers = {path: read_header(path) for path in paths}
    if not any(map(is_shard, headers.values())):
        return None
    for directory in {path.parent for path in paths}:
        _check_complete(directory, {path.name: header for path, header in headers.items() if path.parent == directory})
    return NativeSource(headers, threads)


def _check_complete(directory: Path, headers: Mapping[str, Header]) -> None:
    for path in directory.glob(f"*{INDEX_SUFFIX}"):
        weight_map = json.loads(path.read_bytes()).get("weight_map", {})
        if not set(weight_map.values()) & headers.keys():
            continue  # the index of a variant that is not being loaded
        names = {name: {entry.name for entry in header.tensors} for name, header in headers.items()}
        for tensor, file in weight_map.items():
            if tensor not in names.get(file, ()):
                raise MissingPartError(f"{path}: names {tensor!r} in {file}, which has no such tensor; fetch it again")
    if (directory / MANIFEST_NAME).is_file():
        for entry in read_manifest(directory).files:
            shard = entry.kind == "shard" and "/" not in entry.path
            if shard and entry.path not in headers and not (directory / entry.path).is_file():
                raise MissingPartError(f"{directory / entry.path}: {MANIFEST_NAME} names this file; fetch it again")


def df11_source(
    files: Sequence[str], threads: int, shapes: Mapping[str, Sequence[int]]
) -> tuple[Df11Source, list[str]]:
    """The source of the DFloat11 directory that holds a checkpoint file, and all weight files of that directory."""
    if not files or not files[0].endswith(SHARD_SUFFIX):
        raise UsageError("a DFloat11 model loads from a directory of .safetensors files; name that directory")
    directory = Path(files[0]).parent
    return Df11Source(directory, threads, shapes), [str(path) for path in sorted(directory.glob(f"*{SHARD_SUFFIX}"))]
