"""Writing the DFloat11 layout: the files that the package's release 0.5.0 writes for the same units, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitforbit.archive.dfloat11 import files
from bitforbit.archive.dfloat11.stfile import StoredTensor, library_layout, open_directory
from bitforbit.archive.dfloat11.units import PatternDict, Unit, derive_units, units_from_patterns
from bitforbit.codecs.df11.encode import encode_unit
from bitforbit.codecs.df11.unit import BYTES_PER_THREAD, THREADS_PER_BLOCK
from bitforbit.errors import AlreadyCompressedError, UsageError

FORMAT_VERSION = "0.5.0"
"""The release of the DFloat11 package whose files these are."""

_SPOOL_NAME = ".dfloat11-units.tmp"

# A tensor to be stored: dtype, shape, and a function that gives its bytes.
_Source = tuple[str, tuple[int, ...], Callable[[], npt.NDArray[np.uint8]]]


def write_directory(
    src: Path,
    dst: Path,
    *,
    units: PatternDict | None = None,
    single_file: bool = False,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compress a model directory of BF16 safetensors into ``dst``, an empty directory.

    ``units`` overrides the units derived from the tensors' names, in the form of ``pattern_dict``. One file per unit
    and one for the rest is written, or with ``single_file`` one for all, whose ``config.json`` then holds nothing but
    the DFloat11 members. ``progress`` is told the bytes of the source as they are done. At most one unit is in memory.

    An output head that is tied to the embedding and equal to it is left out, as it is in files of the package.

    Raises SourceNotFoundError, PickleRefusedError, GgufRefusedError, AlreadyCompressedError, UsageError for units that
    do not fit, Df11UnrepresentableError for weights of exponent 240 and above, and the header errors of damaged files.
    """
    files.require_directory(src)
    files.require_directory(dst)
    config = files.load_config(src)
    _refuse_compressed(src, config)
    tensors = open_directory(src)
    if not tensors:
        files.refuse_without_safetensors(src)
    for name in _tied(tensors, config):
        del tensors[name]
    entries = [tensor.entry for tensor in tensors.values()]
    plan = derive_units(entries) if units is None else units_from_patterns(units, entries)
    if not plan.units:
        raise UsageError(
            f"{src}: expected BF16 matrices in layers, embed_tokens or lm_head, got none; state units of your own, or "
            "use the native format, which compresses every floating-point tensor"
        )
    done = progress or (lambda _: None)
    if single_file:
        _write_single(dst, tensors, plan.units, threads, done)
    else:
        _write_files(dst, files.weights_stem(src), tensors, plan.units, threads, done)
    _write_config(dst, config, plan.pattern_dict, single_file)
    files.copy_other_files(src, dst)


def _refuse_compressed(src: Path, config: Mapping[str, object]) -> None:
    quantization = config.get("quantization_config")
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == "bitforbit"
    if ours or files.CONFIG_KEY in config:
        kind = "bitforbit" if ours else "DFloat11"
        raise AlreadyCompressedError(f"{src}: expected a BF16 model, got one compressed by {kind}; decompress it first")


def _tied(tensors: Mapping[str, StoredTensor], config: Mapping[str, object]) -> list[str]:
    text = config.get("text_config")
    if not (config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings"))):
        return []
    embeddings = [name for name in tensors if name.endswith("embed_tokens.weight")]
    heads = [name for name in tensors if name == "lm_head.weight" or name.endswith(".lm_head.weight")]
    return [head for head in heads if any(_equal(tensors[head], tensors[name]) for name in embeddings)]


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.entry.dtype, one.entry.shape) != (other.entry.dtype, other.entry.shape):
        return False
    a, b = one.map(), other.map()
    step = 1 << 24
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, a.size, step))


def _write_files(
    dst: Path,
    stem: str,
    tensors: Mapping[str, StoredTensor],
    units: Iterable[Unit],
    threads: int,
    done: Callable[[int], None],
) -> None:
    rest = dict(tensors)
    for unit in units:
        for name in unit.weights:
            del rest[name]
    written = {f"{stem}.safetensors"}
    for unit in units:
        file_name = f"{unit.name.replace('.', '_')}.safetensors"
        if file_name in written:
            raise UsageError(f"unit {unit.name!r} would be written to {file_name}, which exists; state other units")
        written.add(file_name)
        sources = _encode(unit, tensors, threads)
        done(sum(tensors[name].entry.nbytes for name in unit.weights))
        for name in [name for name in rest if name.startswith(f"{unit.name}.")]:
            sources[name] = _plain(rest.pop(name), done)
        _write_file(dst / file_name, sources, None)
    if rest:
        sources = {name: _plain(tensor, done) for name, tensor in rest.items()}
        _write_file(dst / f"{stem}.safetensors", sources, {"format": "pt"})


def _write_single(
    dst: Path,
    tensors: Mapping[str, StoredTensor],
    units: Iterable[Unit],
    threads: int,
    done: Callable[[int], None],
) -> None:
    # Sizes, and with them the header, are known only when the last unit is done, so units wait in a file.
    spool_path = dst / _SPOOL_NAME
    sources: dict[str, _Source] = {}
    rest = dict(tensors)
    try:
        with spool_path.open("wb") as spool:
            for unit in units:
                for name, (dtype, shape, data) in _encode(unit, tensors, threads).items():
                    part = data()
                    sources[name] = (dtype, shape, _spooled(spool_path, spool.tell(), part.size))
                    spool.write(part.data)
                for name in unit.weights:
                    del rest[name]
                done(sum(tensors[name].entry.nbytes for name in unit.weights))
        sources.update((name, _plain(tensor, done)) for name, tensor in rest.items())
        _write_file(dst / "model.safetensors", sources, None)
    finally:
        spool_path.unlink(missing_ok=True)


def _spooled(path: Path, offset: int, size: int) -> Callable[[], npt.NDArray[np.uint8]]:
    return lambda: np.memmap(path, np.uint8, "r", offset, (size,)) if size else np.empty(0, np.uint8)


def _encode(unit: Unit, tensors: Mapping[str, StoredTensor], threads: int) -> dict[str, _Source]:
    matrices = [tensors[name].map().view("<u2").astype(np.uint16, copy=False) for name in unit.weights]
    encoded = encode_unit(matrices, names=unit.weights, threads=threads)
    sources: dict[str, _Source] = {}
    for suffix, array in encoded.tensors().items():
        dtype = "I64" if array.dtype == np.int64 else "U8"
        sources[f"{unit.name}.{suffix}"] = (dtype, array.shape, partial(_bytes, array))
    return sources


def _bytes(array: npt.NDArray[np.uint8] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).reshape(-1).view(np.uint8)


def _plain(tensor: StoredTensor, done: Callable[[int], None]) -> _Source:
    def data() -> npt.NDArray[np.uint8]:
        done(tensor.entry.nbytes)
        return tensor.map()

    return tensor.entry.dtype, tensor.entry.shape, data


def _write_file(path: Path, sources: Mapping[str, _Source], metadata: Mapping[str, str] | None) -> None:
    header, entries = library_layout(((name, dtype, shape) for name, (dtype, shape, _) in sources.items()), metadata)
    with path.open("wb") as file:
        file.write(header)
        for entry in entries:
            file.write(sources[entry.name][2]().data)


def _write_config(dst: Path, config: Mapping[str, object], patterns: PatternDict, single_file: bool) -> None:
    members: dict[str, object] = {
        "version": FORMAT_VERSION,
        "threads_per_block": [THREADS_PER_BLOCK],
        "bytes_per_thread": BYTES_PER_THREAD,
        "pattern_dict": {pattern: list(attributes) for pattern, attributes in patterns.items()},
    }
    if single_file:
        text = json.dumps({files.CONFIG_KEY: members}, indent=2)
    else:
        text = json.dumps({**config, files.CONFIG_KEY: members}, indent=2, sort_keys=True) + "\n"
    with (dst / files.CONFIG_NAME).open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
