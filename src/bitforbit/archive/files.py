"""Files that are copied or written whole."""

from __future__ import annotations

from bitforbit.archive.buffers import read_exactly
from bitforbit.archive.pipeline import CHUNK_BYTES, Pipeline, StreamHasher
from bitforbit.archive.shard_writer import opened
from bitforbit.archive.source import SourceFile
from bitforbit.archive.tree import GrowingTree
from bitforbit.format.manifest import FileEntry


def copy_file(file: SourceFile, staging: GrowingTree, pipe: Pipeline, sha256: bool = True) -> FileEntry:
    """Copy a source file into the tree, with its checksums. Raises ChecksumError if it changes meanwhile."""
    with staging.create(file.path) as out, opened(file) as fd, pipe.hasher(sha256) as hasher:
        for offset in range(0, file.size, CHUNK_BYTES):
            nbytes = min(CHUNK_BYTES, file.size - offset)
            with pipe.lease(nbytes) as lease:
                read_exactly(fd, lease.data, offset, str(file.location))
                hasher.update(lease)
                out.write(lease.data.data)
            pipe.progress.advance(nbytes)
        digests = hasher.digests()
    return FileEntry(file.path, "copied", file.size, digests.sha256 or "", digests.size, digests.xxh3_128)


def hash_file(fd: int, size: int, where: str, hasher: StreamHasher, pipe: Pipeline) -> None:
    """Send a whole file to a hasher."""
    for offset in range(0, size, CHUNK_BYTES):
        with pipe.lease(min(CHUNK_BYTES, size - offset)) as lease:
            read_exactly(fd, lease.data, offset, where)
            hasher.update(lease)


def write_small(staging: GrowingTree, path: str, data: bytes) -> None:
    """Write bytes held in memory as a file of the tree."""
    with staging.guard(path), staging.create(path) as out:
        out.write(data)
