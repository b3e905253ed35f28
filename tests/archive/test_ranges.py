"""Regions of tensors read from files, against reading the whole tensor and slicing it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitforbit import archive, dtypes, errors
from bitforbit.archive import ranges
from bitforbit.archive.pipeline import Pipeline
from bitforbit.archive.ranges import Region
from bitforbit.archive.shard_reader import ShardReader
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.format.layout import open_shard
from helpers.bits import assert_bitwise_equal
from helpers.models import Tensor, gaussian, noise, safetensors_bytes

CODEC = PlanesCodec()
Slice = tuple[int, int] | None


def patterns() -> Tensor:
    """All of two bytes, between rows that make the tensor worth coding."""
    words = np.random.default_rng(0).permutation(1 << 16).astype("<u2")
    return "BF16", (5 * 1024, 64), gaussian((2048, 64))[2] + words.tobytes() + gaussian((2048, 64), 1)[2]


def widened() -> Tensor:
    words = np.frombuffer(gaussian((130, 96))[2], "<u2").astype("<u4") << 16
    return "F32", (130, 96), words.tobytes()


TENSORS: dict[str, Tensor] = {
    "large": gaussian((512, 768), 10),
    "bf16": gaussian((515, 200)),
    "patterns": patterns(),
    "f16": gaussian((70, 130), 1, "F16"),
    "f32": gaussian((70, 130), 2, "F32"),
    "widened": widened(),
    "e4m3": gaussian((300, 257), 3, "F8_E4M3"),
    "e5m2": gaussian((300, 257), 4, "F8_E5M2"),
    "experts": gaussian((5, 33, 72), 5),
    "convolution": gaussian((64, 32, 3, 3), 6),
    "vector": gaussian((100 * 4096,), 7),
    "odd_vector": gaussian((65537 + 2,), 8),
    "narrow": gaussian((5000, 16), 9),
    "ids": noise("I64", (30, 7)),
    "noise": noise("BF16", (65, 33)),
    "none": ("BF16", (0, 8), b""),
    "no_columns": ("BF16", (8, 0), b""),
    "scalar": ("F32", (), b"\x00\x00\x80\x3f"),
    "nibbles": noise("F4", (4, 6)),
}
SLICED = [name for name in TENSORS if name != "nibbles"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    root = tmp_path_factory.mktemp("ranges")
    (root / "model.safetensors").write_bytes(safetensors_bytes(TENSORS))
    archive.compress(root / "model.safetensors", root / "c.safetensors", threads=1)
    return shard_reader(root / "c.safetensors")


def shard_reader(path: Path) -> ShardReader:
    return ShardReader(open_shard(path), Pipeline(2, 1 << 20, None))


def naive(name: str, rows: Slice, columns: Slice) -> np.ndarray:
    """The whole tensor, then sliced: bytes."""
    dtype, shape, data = TENSORS[name]
    item = dtypes.bits(dtype) // 8
    whole = np.frombuffer(data, np.dtype((np.void, item))).reshape(shape)
    if rows:
        whole = whole[slice(*rows)]
    if columns:
        whole = whole[..., slice(*columns)]
    return np.frombuffer(whole.tobytes(), np.uint8)


def read(reader: ShardReader, name: str, rows: Slice = None, columns: Slice = None, check: bool = False) -> np.ndarray:
    entry = next(e for e in reader.shard.original.tensors if e.name == name)
    region = Region.of(entry.dtype, entry.shape, rows, columns)
    room = np.full(region.nbytes + 64, 0x55, np.uint8)
    with reader.opened() as fd:
        reader.part(fd, entry, region, room[32:-32], check=check)
    assert (room[:32] == 0x55).all()
    assert (room[-32:] == 0x55).all()
    return room[32:-32]


def test_all_are_stored_as_meant(reader: ShardReader) -> None:
    records = reader.shard.record.tensors
    raw = {name for name in TENSORS if records[name].is_raw}
    assert raw == {"ids", "noise", "none", "no_columns", "scalar", "nibbles"}
    assert records["widened"].config["kind"] == "BF16"
    assert records["vector"].config["rows"] == 100


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_region(reader: ShardReader, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(SLICED))
    shape = TENSORS[name][1]

    def draw(length: int) -> Slice:
        end = data.draw(st.integers(0, length))
        return data.draw(st.integers(0, end)), end

    rows = draw(shape[0]) if shape and data.draw(st.booleans()) else None
    columns = draw(shape[-1]) if len(shape) > 1 and data.draw(st.booleans()) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "CHUNK_BYTES", data.draw(st.sampled_from([1, 10_000, 8 << 20])))
        got = read(reader, name, rows, columns, check=data.draw(st.booleans()))
    assert_bitwise_equal(got, naive(name, rows, columns), f"{name} {rows} {columns}")


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_matrix_view(data: st.DataObject) -> None:
    """The format leaves rows and columns of the coded matrix to the writer: they need not divide the shape."""
    rows, cols, other = (data.draw(st.integers(1, n)) for n in (60, 60, 5))
    count = rows * cols
    width = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    words = np.random.default_rng(count).integers(0, 1 << 16, count, np.uint16)
    tensor = CODEC.encode_always(words.view(np.uint8), "BF16", (rows, cols), "BF16", 1)
    sizes = {name: part.nbytes for name, part in tensor.parts.items()}

    def fetch(name: str, offset: int, out: np.ndarray) -> None:
        out[:] = tensor.parts[name][offset : offset + out.nbytes]

    whole = words.reshape(-1, width)
    begin = data.draw(st.integers(0, count // width))
    end = data.draw(st.integers(begin, count // width))
    left = data.draw(st.integers(0, width))
    right = data.draw(st.integers(left, width))
    region = Region.of("BF16", whole.shape, (begin, end), (left, right))
    out = np.empty(region.nbytes, np.uint8)
    row_reader = CODEC.row_reader("BF16", whole.shape, tensor.config, sizes, fetch, end * width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "CHUNK_BYTES", 1000 * other)
        ranges.read_coded(row_reader, region, out, 1)
    assert_bitwise_equal(out, whole[begin:end, left:right].tobytes())


def test_pieces_end_at_blocks() -> None:
    region = Region.of("BF16", (100, 64), (3, 90), None)
    assert list(region.pieces(16 * 64)) == [(3, 16), (16, 32), (32, 48), (48, 64), (64, 80), (80, 90)]


def test_bytes_read(reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal count
        done = preadv(fd, buffers, offset)
        count += done
        return done

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", counting)
    stored = reader.shard.record.tensors["large"].stored_bytes
    read(reader, "large", (64, 128))
    assert stored * 0.125 < count < stored * 0.126
    count = 0
    read(reader, "large", (64, 128), (3, 5), check=True)
    assert count == stored
    count = 0
    read(reader, "noise", (8, 16))
    assert count == 8 * 33 * 2


def test_refused_ranges(reader: ShardReader) -> None:
    for rows, columns in (((0, 516), None), ((-1, 3), None), ((5, 4), None), (None, (0, 201)), (None, (7, 6))):
        with pytest.raises(errors.UsageError, match="expected"):
            read(reader, "bf16", rows, columns)
    with pytest.raises(errors.UsageError, match="both"):
        read(reader, "vector", (0, 1), (0, 1))
    with pytest.raises(errors.UsageError, match="without dimensions"):
        read(reader, "scalar", (0, 1))
    with pytest.raises(errors.UnsupportedDtypeError, match="F4"):
        read(reader, "nibbles", (0, 1))
    assert_bitwise_equal(read(reader, "vector", None, (5, 70)), naive("vector", (5, 70), None))


@pytest.mark.parametrize("name", ["bf16", "noise"])
def test_damaged_bytes(reader: ShardReader, name: str, tmp_path: Path) -> None:
    """Damage of rows that are not read is noticed only where all is to be checked."""
    shard = reader.shard
    entry = next(e for e in shard.original.tensors if e.name == name)
    file = bytearray(shard.path.read_bytes())
    parts = shard.record.tensors[name].parts
    at = shard.header.data_start + shard.begin[name] + (parts["code"] + parts["digits"] if parts else 0)
    file[at] ^= 1  # sign and mantissa of the first element
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(file)
    damaged = shard_reader(path)
    assert entry.shape[0] > 40
    assert_bitwise_equal(read(damaged, name, (40, 60)), naive(name, (40, 60), None))
    for rows in ((0, 1), (40, 60), (7, 7)):
        with pytest.raises(errors.ChecksumError, match=f"damaged.safetensors, tensor '{name}'"):
            read(damaged, name, rows, check=True)


def test_contradicting_bytes(reader: ShardReader, tmp_path: Path) -> None:
    shard = reader.shard
    at = shard.header.data_start + shard.begin["bf16"] + shard.record.tensors["bf16"].parts["code"]
    file = bytearray(shard.path.read_bytes())
    file[at : at + 16] = b"\xff" * 16  # digits of the first block
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(file)
    with pytest.raises(errors.CorruptTensorError, match="tensor 'bf16'"):
        read(shard_reader(path), "bf16", (0, 3))
    assert_bitwise_equal(read(shard_reader(path), "bf16", (16, 30)), naive("bf16", (16, 30), None))


def test_file_cut_short(reader: ShardReader, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(reader.shard.path.read_bytes())
    short = shard_reader(path)
    os.truncate(path, short.shard.header.data_start + short.shard.begin["bf16"] + 5000)
    for check in (False, True):
        with pytest.raises(errors.TruncatedFileError, match="tensor 'bf16'"):
            read(short, "bf16", (500, 510), check=check)
