"""Reading DFloat11 directories: every tensor of the original model, with its name and shape.

Tensors are found by their names alone, as the DFloat11 package does it, so both of its layouts are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitforbit.archive.dfloat11 import files
from bitforbit.archive.dfloat11.patterns import fullmatch
from bitforbit.archive.dfloat11.shapes import ShapeSource
from bitforbit.archive.dfloat11.stfile import StoredTensor, open_directory
from bitforbit.archive.dfloat11.units import PatternDict, parse_pattern_dict, weight_names
from bitforbit.codecs.df11.decode import decode_unit, matrix_bounds
from bitforbit.codecs.df11.unit import BYTES_PER_THREAD, TENSOR_NAMES, THREADS_PER_BLOCK, Df11Unit
from bitforbit.errors import Df11FormatError, DuplicateKeyError, MissingPartError, NotCompressedError

_MARKS = ("luts", "encoded_exponent", "sign_mantissa")
_STORED_RANKS = {"luts": 2}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, safetensors dtype and shape of a tensor of the original model, and its size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class RestoredTensor:
    """A tensor of the original model. data: its little-endian, row-major bytes, uint8 ``[nbytes]``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


class Df11Directory:
    """An opened DFloat11 directory. Opening reads headers and split positions; weights are decoded on iteration.

    ``units`` overrides the ``pattern_dict`` of ``config.json``; ``shapes`` states shapes of matrices by tensor name,
    where they cannot be derived.

    Raises SourceNotFoundError, PickleRefusedError, NotCompressedError, MissingPartError, Df11FormatError,
    Df11ShapeError, DuplicateKeyError and the header errors of damaged files.
    """

    def __init__(
        self, src: Path, *, shapes: Mapping[str, Sequence[int]] | None = None, units: PatternDict | None = None
    ) -> None:
        files.require_directory(src)
        self.config = files.load_config(src)
        self._stored = open_directory(src)
        if not self._stored:
            files.refuse_without_safetensors(src)
        unit_names = _unit_names(self._stored)
        if not unit_names:
            raise NotCompressedError(f"{src}: expected tensors of a DFloat11 model (*.luts and others), got none")
        patterns = _patterns(self.config) if units is None else units
        parts = {f"{unit}.{suffix}" for unit in unit_names for suffix in TENSOR_NAMES}
        plain = {name: tensor.entry for name, tensor in self._stored.items() if name not in parts}
        source = ShapeSource({name: entry.shape for name, entry in plain.items()}, self.config, shapes or {})
        self._units: dict[str, list[TensorInfo]] = {}
        infos = {name: TensorInfo(name, e.dtype, e.shape, e.nbytes) for name, e in plain.items()}
        self._plain = list(infos.values())
        for unit in unit_names:
            sizes = [end - begin for begin, end in matrix_bounds(self._load(unit))]
            names = _weight_names(unit, len(sizes), patterns)
            self._units[unit] = [
                TensorInfo(name, "BF16", shape, 2 * size)
                for name, shape, size in zip(names, source.shapes(unit, names, sizes), sizes, strict=True)
            ]
            for info in self._units[unit]:
                if info.name in infos:
                    raise DuplicateKeyError(f"{src}: unit {unit!r} holds {info.name!r}, which is also stored elsewhere")
                infos[info.name] = info
        self.tensors: tuple[TensorInfo, ...] = tuple(infos.values())
        """All tensors of the original model: the plain ones, then those of the units."""

    def __iter__(self) -> Iterator[RestoredTensor]:
        """Decode on one thread: see :meth:`decode`."""
        return self.decode()

    def decode(self, threads: int = 1) -> Iterator[RestoredTensor]:
        """Every tensor, in the order of ``tensors``; at most one decoded unit is held. Raises Df11FormatError."""
        for info in self._plain:
            yield self.plain_tensor(info)
        for unit in self._units:
            yield from self.decode_unit(unit, threads)

    def plain_tensor(self, info: TensorInfo) -> RestoredTensor:
        """A tensor of no unit; its data are read from the file when they are touched."""
        return RestoredTensor(info.name, info.dtype, info.shape, self._stored[info.name].map())

    @property
    def units(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the tensors of every unit."""
        return {unit: tuple(info.name for info in infos) for unit, infos in self._units.items()}

    def stored_names(self, unit: str) -> tuple[str, ...]:
        """Names of the tensors in the files that hold a unit."""
        return tuple(f"{unit}.{suffix}" for suffix in TENSOR_NAMES)

    def stored_unit(self, unit: str) -> Df11Unit:
        """The arrays of a unit as they are stored. Raises Df11FormatError."""
        return self._load(unit)

    def decode_unit(self, unit: str, threads: int = 1) -> Iterator[RestoredTensor]:
        """The tensors of one unit. Raises Df11FormatError."""
        try:
            words = decode_unit(self._load(unit), threads=threads)
        except Df11FormatError as e:
            raise type(e)(f"unit {unit!r} in {self._stored[f'{unit}.luts'].path}: {e}") from None
        data = words.astype("<u2", copy=False).view(np.uint8)
        begin = 0
        for info in self._units[unit]:
            yield RestoredTensor(info.name, info.dtype, info.shape, data[begin : begin + info.nbytes])
            begin += info.nbytes

    def _load(self, unit: str) -> Df11Unit:
        arrays: dict[str, npt.NDArray[np.uint8]] = {}
        for suffix in TENSOR_NAMES:
            tensor = self._stored[f"{unit}.{suffix}"]
            dtype, shape = tensor.entry.dtype, tensor.entry.shape
            wanted = "I64" if suffix == "split_positions" else "U8"
            if dtype != wanted or len(shape) != _STORED_RANKS.get(suffix, 1):
                raise Df11FormatError(
                    f"{tensor.path}, tensor {tensor.entry.name!r}: expected {wanted} with "
                    f"{_STORED_RANKS.get(suffix, 1)} dimensions, got {dtype} {list(shape)}"
                )
            arrays[suffix] = np.asarray(tensor.map())
        splits = arrays.pop("split_positions").view("<i8").astype(np.int64)
        luts = arrays.pop("luts").reshape(self._stored[f"{unit}.luts"].entry.shape)
        return Df11Unit(luts=luts, split_positions=splits, **arrays)


def read_directory(
    src: Path,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    units: PatternDict | None = None,
    threads: int = 1,
) -> Iterator[RestoredTensor]:
    """Open a DFloat11 directory and decode its tensors one by one: see :class:`Df11Directory`."""
    return Df11Directory(src, shapes=shapes, units=units).decode(threads)


def _unit_names(stored: Mapping[str, StoredTensor]) -> list[str]:
    marks: dict[str, int] = {}
    for name in stored:
        unit, _, suffix = name.rpartition(".")
        if suffix in _MARKS and unit:
            marks[unit] = marks.get(unit, 0) + 1
    names = [unit for unit, count in marks.items() if count > 1]
    for unit in names:
        for suffix in TENSOR_NAMES:
            if f"{unit}.{suffix}" not in stored:
                raise MissingPartError(f"unit {unit!r}: expected a tensor {suffix!r}, got none; download it again")
    return names


def _patterns(config: Mapping[str, object]) -> PatternDict:
    members = config.get(files.CONFIG_KEY, {})
    if not isinstance(members, dict):
        raise Df11FormatError(f"config.json: expected {files.CONFIG_KEY} to be an object, got {members!r:.80}")
    threads, size = members.get("threads_per_block", [THREADS_PER_BLOCK]), members.get("bytes_per_thread", 8)
    if threads != [THREADS_PER_BLOCK] or size != BYTES_PER_THREAD:
        raise Df11FormatError(
            f"config.json: expected {THREADS_PER_BLOCK} threads per block and {BYTES_PER_THREAD} bytes per thread, "
            f"got {threads!r:.80} and {size!r:.80}; no released reader knows other values"
        )
    patterns = parse_pattern_dict(members.get("pattern_dict", {}))
    if patterns is None:
        raise Df11FormatError("config.json: expected pattern_dict to map patterns to lists of module names")
    return patterns


def _weight_names(unit: str, count: int, patterns: PatternDict) -> tuple[str, ...]:
    matching = [attributes for pattern, attributes in patterns.items() if fullmatch(pattern, unit)]
    for attributes in matching:
        names = weight_names(unit, attributes)
        if len(names) == count and len(set(names)) == count:
            return names
    if count == 1 and not matching:
        return (f"{unit}.weight",)
    raise Df11FormatError(
        f"unit {unit!r} holds {count} matrices, but pattern_dict names {[len(a) or 1 for a in matching][:5]} for it; "
        "state the units in a file of your own"
    )
