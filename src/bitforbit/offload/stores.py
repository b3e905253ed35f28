"""Where the images of blocks are while they do not run: host memory, or the files that their parts were loaded from."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bitforbit.archive.buffers import aligned_buffer
from bitforbit.codecs.base import Bytes
from bitforbit.errors import BlockReadError
from bitforbit.offload.image import FileRange, Image, Key

CHUNK_BYTES = 32 << 20
"""What is read at a time."""
_GAP_BYTES = 4096
"""Bytes between two tensors of a file that are read along with them, into nowhere."""
_IOV_MAX = 1024


class Store(Protocol):
    """One block's image."""

    @property
    def nbytes(self) -> int:
        """Of the image."""
        ...

    @property
    def in_memory(self) -> torch.Tensor | None:
        """The whole image, if it is in host memory: then there are no chunks."""
        ...

    @property
    def chunks(self) -> Sequence[Chunk]:
        """What it is read in, in order."""
        ...

    def read(self, chunk: Chunk, out: Bytes) -> None:
        """The image's bytes [chunk.begin, chunk.end) into ``out``. Raises BlockReadError."""
        ...

    def tensor(self, key: Key) -> torch.Tensor:
        """One tensor of the image, in host memory. Raises BlockReadError."""
        ...


@dataclass(frozen=True)
class _Span:
    """Bytes of a file, and where in the image they belong; None: nowhere."""

    begin: int
    nbytes: int
    to: int | None


@dataclass(frozen=True)
class Run:
    """Adjacent spans of one file."""

    path: Path
    begin: int
    nbytes: int
    spans: tuple[_Span, ...]


@dataclass(frozen=True)
class Chunk:
    """Bytes [begin, end) of an image, and what of them comes from which file; the rest is padding."""

    begin: int
    end: int
    runs: tuple[Run, ...]


class HostStore:
    """An image in host memory."""

    chunks: Sequence[Chunk] = ()

    def __init__(self, name: str, image: Image, memory: torch.Tensor) -> None:
        """``memory`` is uint8 ``[nbytes]``."""
        self.name = name
        self.nbytes = image.nbytes
        self.in_memory: torch.Tensor | None = memory
        self._pieces = image.pieces

    def read(self, chunk: Chunk, out: Bytes) -> None:
        """There are no chunks."""
        raise AssertionError(f"{self.name} is in memory")

    def tensor(self, key: Key) -> torch.Tensor:
        """See Store."""
        assert self.in_memory is not None
        return self._pieces[key].view(self.in_memory)


class FileStore:
    """An image whose tensors are in files, which stay open.

    What was read is dropped from the system's page cache: a model that is read again and again would else push
    everything out of it and find nothing there.
    """

    in_memory: torch.Tensor | None = None

    def __init__(self, name: str, image: Image, ranges: Iterable[tuple[Key, FileRange]], drop_cache: bool) -> None:
        """``name`` is the block's. Raises OSError for a file that cannot be opened."""
        self.name = name
        self.nbytes = image.nbytes
        self._drop_cache = drop_cache
        self._pieces = image.pieces
        self._ranges = dict(ranges)
        spans = sorted((image.pieces[key].begin, place) for key, place in self._ranges.items())
        self.chunks = tuple(_chunks(spans, image.nbytes))
        self._fds: dict[Path, int] = {}
        self._finalizer = weakref.finalize(self, _close, self._fds)
        for _, place in spans:
            if place.path not in self._fds:
                self._fds[place.path] = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, chunk: Chunk, out: Bytes) -> None:
        """See Store."""
        for run in chunk.runs:
            self._read(run, [_target(span, chunk.begin, out) for span in run.spans])

    def tensor(self, key: Key) -> torch.Tensor:
        """See Store."""
        (path, begin, nbytes), piece = self._ranges[key], self._pieces[key]
        memory = aligned_buffer(nbytes)
        self._read(Run(path, begin, nbytes, ()), [memoryview(memory.data)])
        return torch.from_numpy(memory).view(piece.dtype).view(piece.shape)

    def _read(self, run: Run, views: list[memoryview]) -> None:
        fd = self._fds[run.path]
        try:
            done = _read(fd, views, run.begin)
            if self._drop_cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, run.begin, run.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as e:
            raise BlockReadError(
                e.errno, f"block {self.name!r}: reading {run.nbytes} bytes at {run.begin} failed: {e.strerror}; "
                "see to the disk and run the model again", str(run.path),
            ) from e  # fmt: skip
        if done < run.nbytes:
            raise BlockReadError(
                f"{run.path}, block {self.name!r}: expected {run.nbytes} bytes at {run.begin}, got {done}; the "
                "file was changed after the model was loaded: restore it, and load the model again"
            )


def _close(fds: dict[Path, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])


def _chunks(spans: Sequence[tuple[int, FileRange]], nbytes: int) -> Iterable[Chunk]:
    """Cut an image into chunks; ``spans`` are its tensors, with their places in it, in order."""
    for begin in range(0, nbytes, CHUNK_BYTES):
        end = min(nbytes, begin + CHUNK_BYTES)
        runs: list[Run] = []
        for at, (path, position, length) in spans:
            first, last = max(at, begin), min(at + length, end)
            if first < last:
                _add(runs, path, _Span(position + first - at, last - first, first))
        yield Chunk(begin, end, tuple(runs))


def _add(runs: list[Run], path: Path, span: _Span) -> None:
    if runs:
        last = runs[-1]
        gap = span.begin - (last.begin + last.nbytes)
        if last.path == path and 0 <= gap <= _GAP_BYTES and len(last.spans) < _IOV_MAX - 1:
            between = (_Span(last.begin + last.nbytes, gap, None),) if gap else ()
            runs[-1] = Run(path, last.begin, last.nbytes + gap + span.nbytes, (*last.spans, *between, span))
            return
    runs.append(Run(path, span.begin, span.nbytes, (span,)))


def _target(span: _Span, chunk_begin: int, out: Bytes) -> memoryview:
    if span.to is None:
        return memoryview(bytearray(span.nbytes))
    return memoryview(out.data)[span.to - chunk_begin : span.to - chunk_begin + span.nbytes]


def _read(fd: int, views: list[memoryview], offset: int) -> int:
    """Fill the views, one after the other, with what follows ``offset``. Returns how much there was."""
    done = 0
    while views:
        count = os.preadv(fd, views, offset + done)
        if count == 0:
            break
        done += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
    return done


def to_host(store: Store) -> torch.Tensor:
    """A block's whole image in host memory: the store's own, or a copy. Raises BlockReadError."""
    if store.in_memory is not None:
        return store.in_memory
    memory = aligned_buffer(store.nbytes)
    for chunk in store.chunks:
        store.read(chunk, memory[chunk.begin : chunk.end])
    return torch.from_numpy(np.asarray(memory))
