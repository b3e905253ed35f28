"""Part of a tensor of a compressed checkpoint, against restoring it and slicing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitforbit import archive, errors
from bitforbit.integrations.source import NativeSource, native_source
from helpers.models import build_model, gaussian, noise, safetensors_bytes
from torch_helpers import assert_same_bits

Range = tuple[int, int] | None
CASES: list[tuple[Range, Range]] = [
    (None, None),
    ((0, 12), None),
    ((33, 96), None),
    (None, (0, 32)),
    (None, (17, 96)),
    ((5, 5), None),
    ((16, 32), (64, 65)),
]


def make(root: Path) -> tuple[Path, NativeSource]:
    """A compressed directory, with a file that was never compressed among its shards."""
    build_model(root / "model")
    archive.compress(root / "model", root / "c", threads=1)
    plain = {"plain.weight": gaussian((96, 96)), "plain.ids": noise("I64", (96, 96)), "plain.small": noise("F4", (2,))}
    (root / "c" / "adapter.safetensors").write_bytes(safetensors_bytes(plain))
    source = native_source([str(path) for path in sorted((root / "c").glob("*.safetensors"))], 1)
    assert source is not None
    return root / "c", source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> NativeSource:
    return make(tmp_path_factory.mktemp("slices"))[1]


@pytest.mark.parametrize("name", ["model.layers.1.proj.weight", "model.layers.0.mlp.weight", "plain.weight"])
@pytest.mark.parametrize("check", [False, True])
def test_slices(source: NativeSource, name: str, check: bool) -> None:
    anchor = source.tensors[name].unit
    if anchor is None:
        whole = torch.frombuffer(bytearray(gaussian((96, 96))[2]), dtype=torch.bfloat16).reshape(96, 96)
    else:
        (whole,) = source.restore(anchor).values()
    for rows, columns in CASES:
        got = source.restore_slice(name, rows, columns, check=check)
        assert got.is_contiguous()
        assert_same_bits(got, whole[slice(*(rows or (None,))), slice(*(columns or (None,)))].contiguous())


def test_vectors_and_integers(source: NativeSource) -> None:
    assert_same_bits(source.restore_slice("model.layers.0.norm.weight", (3, 9)), torch.ones(6))
    assert_same_bits(source.restore_slice("model.layers.1.ids", None, (1, 3), check=True), torch.tensor([1, 2]))


def test_refused(source: NativeSource) -> None:
    for name in ("model.layers.1.proj.weight", "plain.weight"):
        with pytest.raises(errors.UsageError, match="rows within 0 to 96"):
            source.restore_slice(name, (0, 97))
    with pytest.raises(errors.UsageError, match=r"absent\.weight"):
        source.restore_slice("absent.weight")
    with pytest.raises(errors.UnsupportedDtypeError, match="F4"):
        source.restore_slice("plain.small")


def test_damaged(tmp_path: Path) -> None:
    directory, source = make(tmp_path)
    path = directory / "model-00001-of-00002.safetensors"
    file = bytearray(path.read_bytes())
    record = source.record("model.layers.0.proj.weight")
    file[-record.parts["tails"] :] = bytes(record.parts["tails"])  # raw tensors lie at the end
    path.write_bytes(file)
    with pytest.raises(errors.ChecksumError, match=r"00001-of-00002.safetensors, tensor 'model.layers.0.ids'"):
        source.restore_slice("model.layers.0.ids", (0, 0), check=True)
    path.write_bytes(file[: len(file) // 4])
    with pytest.raises(errors.TruncatedFileError, match=r"tensor 'model.layers.0.mlp.weight'"):
        source.restore_slice("model.layers.0.mlp.weight", (180, 190))
