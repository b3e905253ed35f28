"""Images of blocks in files."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bitforbit.errors import BlockReadError
from bitforbit.offload import stores
from bitforbit.offload.image import FileRange, Image, Key
from bitforbit.offload.stores import FileStore, to_host

LENGTHS = [0, 1, 63, 256, 300, 4096, 5000, 2]


def write(directory: Path, gap: int, files: int = 1) -> tuple[list[bytes], list[FileRange]]:
    """Tensors of these lengths, each behind ``gap`` bytes that belong to nothing."""
    generator = np.random.default_rng(0)
    data = [generator.integers(0, 256, length, np.uint8).tobytes() for length in LENGTHS]
    ranges = []
    for number in range(files):
        path, content = directory / f"{number}.bin", b""
        for each in data[number::files]:
            content += bytes(gap)
            ranges.append((FileRange(path, len(content), len(each)), each))
            content += each
        path.write_bytes(content)
    return [each for _, each in ranges], [place for place, _ in ranges]


def store(ranges: list[FileRange]) -> tuple[FileStore, Image]:
    keys = [Key(0, str(number)) for number in range(len(ranges))]
    image = Image.of([(key, torch.uint8, (place.nbytes,)) for key, place in zip(keys, ranges, strict=True)])
    return FileStore("layers.3", image, zip(keys, ranges, strict=True), True), image


@pytest.mark.parametrize("gap", [0, 1, 4096, 5000])
@pytest.mark.parametrize("chunk", [64, 512, 1 << 20])
@pytest.mark.parametrize("files", [1, 3])
def test_images(gap: int, chunk: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "CHUNK_BYTES", chunk)
    data, ranges = write(tmp_path, gap, files)
    made, image = store(ranges)
    memory = to_host(made)
    assert memory.numel() == image.nbytes == made.nbytes
    for (key, piece), expected in zip(image.pieces.items(), data, strict=True):
        assert piece.begin % 256 == 0
        assert made.tensor(key).numpy().tobytes() == expected
        assert piece.view(memory).numpy().tobytes() == expected


@pytest.mark.parametrize(("gap", "calls"), [(0, 1), (4096, 1), (4097, 7)])
def test_adjacent_tensors_are_read_at_once(
    gap: int, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ranges = write(tmp_path, gap)
    made, _ = store(ranges)
    seen = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: seen.append(offset) or real(fd, views, offset))
    to_host(made)
    assert len(seen) == calls


def test_short_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, ranges = write(tmp_path, 7)
    made, image = store(ranges)
    real = os.preadv

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        left, cut = 100, []
        for view in views:
            cut.append(view[:left])
            left -= len(cut[-1])
        return real(fd, cut, offset)

    monkeypatch.setattr(os, "preadv", short)
    memory = to_host(made)
    for piece, expected in zip(image.pieces.values(), data, strict=True):
        assert piece.view(memory).numpy().tobytes() == expected


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    _, ranges = write(tmp_path, 0)
    made, _ = store(ranges)
    with (tmp_path / "0.bin").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(BlockReadError, match=r"0\.bin, block 'layers\.3': expected \d+ bytes at 0, got 5000"):
        to_host(made)


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ranges = write(tmp_path, 0)
    made, _ = store(ranges)

    def fail(fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(BlockReadError, match=r"block 'layers\.3'.*Input/output error") as caught:
        to_host(made)
    assert caught.value.errno == 5
    assert caught.value.filename == str(tmp_path / "0.bin")


def open_files(directory: Path) -> int:
    """How many descriptors of this process are of files there."""
    return sum(os.path.realpath(each).startswith(str(directory)) for each in Path("/proc/self/fd").iterdir())


def test_files_are_closed(tmp_path: Path) -> None:
    _, ranges = write(tmp_path, 0, 3)
    made, _ = store(ranges)
    assert open_files(tmp_path) == 3
    del made
    gc.collect()
    assert open_files(tmp_path) == 0


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    _, ranges = write(tmp_path, 0, 2)
    (tmp_path / "1.bin").unlink()
    with pytest.raises(FileNotFoundError):
        store(ranges)
    gc.collect()
    assert open_files(tmp_path) == 0
