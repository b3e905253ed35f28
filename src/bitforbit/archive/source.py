"""What lies in a source directory, and which sources are refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitforbit.archive.rewrite import load_object
from bitforbit.errors import (
    AlreadyCompressedError,
    DestinationInsideSourceError,
    GgufRefusedError,
    PickleRefusedError,
    SourceNotFoundError,
    UsageError,
)
from bitforbit.format.header import Header, read_header
from bitforbit.format.jsontext import is_unicode
from bitforbit.format.layout import is_shard
from bitforbit.format.spec import INDEX_SUFFIX, MANIFEST_NAME, QUANT_METHOD, SHARD_SUFFIX

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GGUF_SUFFIX = ".gguf"
PIPELINE_NAME = "model_index.json"
"""What a pipeline of diffusers has beside its components."""

SKIPPED_DIRECTORIES = (".git", ".cache/huggingface")
"""Left out wherever they are: they describe how the directory was fetched, and are no part of the model."""

_CONVERT = (
    "expected .safetensors files, got Python pickles, which can run code when they are read; convert them first: "
    "`AutoModel.from_pretrained(SOURCE).save_pretrained(DIRECTORY)` in a sandbox, or "
    "https://huggingface.co/spaces/safetensors/convert"
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: ``path`` is relative with '/', ``location`` where to open it, size in bytes, time in nanoseconds."""

    path: str
    location: Path
    size: int
    mtime_ns: int

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and modification time: changes when the file does."""
        return self.size, self.mtime_ns


@dataclass(frozen=True, slots=True)
class SourceTree:
    """A directory's files, sorted by path, and its empty directories."""

    root: Path
    files: Sequence[SourceFile]
    directories: Sequence[str]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def stamps(self) -> Mapping[str, tuple[int, int]]:
        """Stamp of every file by path."""
        return {file.path: file.stamp for file in self.files}


def scan(root: Path) -> SourceTree:
    """List a directory recursively, following symbolic links.

    Raises SourceNotFoundError for dangling links, UsageError for loops, devices and names that are not UTF-8.
    """
    files: list[SourceFile] = []
    directories: list[str] = []
    for path, entry, info in _walk(root, "", ()):
        if info is None:
            directories.append(path)
        else:
            files.append(SourceFile(path, entry, info.st_size, info.st_mtime_ns))
    files.sort(key=lambda file: file.path)
    return SourceTree(root, files, sorted(directories))


def scan_directory(src: Path) -> SourceTree:
    """The tree of a source directory. Raises SourceNotFoundError, PickleRefusedError or GgufRefusedError for others."""
    if not src.is_dir():
        if src.exists():
            refuse_kind(src, [src.name])
        raise SourceNotFoundError(f"{src}: expected a model directory, got {'a file' if src.exists() else 'nothing'}")
    return scan(src)


def source_file(location: Path) -> SourceFile:
    """A source that is a single file. Raises SourceNotFoundError, also for what would block or never end."""
    info = _stat(location)
    if not stat.S_ISREG(info.st_mode):
        raise SourceNotFoundError(f"{location}: expected a file, got a directory, device, pipe or socket")
    return SourceFile(location.name, location, info.st_size, info.st_mtime_ns)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise SourceNotFoundError(
                f"{path}: symbolic link to {path.readlink()}, which does not exist; download the model completely"
            ) from None
        raise SourceNotFoundError(f"{path}: no such file or directory") from None


def _walk(
    directory: Path, prefix: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, Path, os.stat_result | None]]:
    info = directory.stat()
    identity = (info.st_dev, info.st_ino)
    if identity in above:
        raise UsageError(f"{directory}: a symbolic link leads back to a directory that contains it; remove the link")
    names = sorted(os.listdir(directory))  # noqa: PTH208 - names, not paths
    if not names and prefix:
        yield prefix.rstrip("/"), directory, None
    for name in names:
        entry, path = directory / name, prefix + name
        if not is_unicode(path):
            raise UsageError(f"{os.fspath(entry)!r}: expected a file name in UTF-8; rename the file")
        info = _stat(entry)
        if stat.S_ISDIR(info.st_mode):
            if not any(f"/{path}".endswith(f"/{skipped}") for skipped in SKIPPED_DIRECTORIES):
                yield from _walk(entry, path + "/", (*above, identity))
        elif stat.S_ISREG(info.st_mode):
            yield path, entry, info
        else:
            raise UsageError(f"{entry}: expected files and directories only, got a device, pipe or socket; remove it")


def check_apart(src: Path, dst: Path) -> None:
    """Refuse a destination that is, holds or lies in the source. Raises DestinationInsideSourceError."""
    a, b = src.resolve(), dst.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise DestinationInsideSourceError(f"expected separate places, got source {a} and destination {b}; move one")


def check_plain(tree: SourceTree) -> dict[str, Header]:
    """Headers of a model's safetensors files by path, if it can be compressed.

    Raises PickleRefusedError, GgufRefusedError, SourceNotFoundError, AlreadyCompressedError or FormatError.
    """
    shards = [file for file in tree.files if file.path.endswith(SHARD_SUFFIX)]
    if not shards:
        refuse_kind(tree.root, [file.path for file in tree.files])
        raise SourceNotFoundError(f"{tree.root}: expected a directory with .safetensors files, got none")
    for file in tree.files:
        name = file.path.rpartition("/")[2]
        if name == MANIFEST_NAME:
            raise AlreadyCompressedError(f"{file.location}: already compressed by bitforbit; compress the original")
        if name == "config.json":
            _check_config(file.location)
    headers = {file.path: read_header(file.location) for file in shards}
    for file in shards:
        check_plain_header(headers[file.path], file.location)
    return headers


def shards_to_compress(tree: SourceTree) -> dict[str, Header]:
    """:func:`check_plain`, without the shards of a pipeline's components that are quantized: those could not be run."""
    headers = check_plain(tree)
    if not any(file.path == PIPELINE_NAME for file in tree.files):
        return headers
    configs = {file.path.rpartition("/")[0]: file for file in tree.files if file.path.endswith("/config.json")}
    kept = {path for path, file in configs.items() if "quantization_config" in (load_object(file.location) or {})}
    return {path: header for path, header in headers.items() if path.rpartition("/")[0] not in kept}


def missing_files(files: Sequence[SourceFile]) -> list[str]:
    """Files that an index among these names, but that are not among them: an incomplete download."""
    there = {file.path for file in files}
    named: set[str] = set()
    for file in files:
        if file.path.endswith(INDEX_SUFFIX):
            directory, slash, _ = file.path.rpartition("/")
            weight_map = (load_object(file.location) or {}).get("weight_map")
            values = weight_map.values() if isinstance(weight_map, dict) else ()
            named.update(directory + slash + name for name in values if isinstance(name, str))
    return sorted(named - there)


def refuse_kind(where: Path, names: Sequence[str]) -> None:
    """Raise PickleRefusedError or GgufRefusedError if the names are of those kinds."""
    for name in names:
        if name.lower().endswith(PICKLE_SUFFIXES):
            raise PickleRefusedError(f"{where}: {name}: {_CONVERT}")
        if name.lower().endswith(GGUF_SUFFIX):
            raise GgufRefusedError(
                f"{where}: {name}: expected .safetensors files, got GGUF, whose weights are mostly quantized already; "
                "compress the model that it was made from"
            )


def check_plain_header(header: Header, location: Path) -> None:
    """Raise AlreadyCompressedError for a shard of bitforbit."""
    if is_shard(header):
        raise AlreadyCompressedError(f"{location}: already compressed by bitforbit; compress the original")


def df11_config(directory: Path) -> bool:
    """Whether a directory is a DFloat11 model: its config.json, or a component's, says so."""
    configs = [directory / "config.json", *sorted(directory.glob("*/config.json"))]
    return any(path.is_file() and "dfloat11_config" in (load_object(path) or {}) for path in configs)


def _check_config(path: Path) -> None:
    config = load_object(path) or {}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        raise AlreadyCompressedError(f"{path}: quant_method is {QUANT_METHOD!r} already; compress the original")
    if "dfloat11_config" in config:
        raise AlreadyCompressedError(
            f"{path}: a DFloat11 model already; decompress it first, then compress the plain model"
        )
