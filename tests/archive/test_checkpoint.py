"""Tensors by name, whole or in part, against safetensors reading the original files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitforbit
from bitforbit import dtypes, errors
from helpers.bits import assert_bitwise_equal
from helpers.models import build_model, gaussian, noise, safetensors_bytes

MIXED = {
    "matrix": gaussian((130, 200)),
    "experts": gaussian((3, 40, 72), 1, "F16"),
    "vector": gaussian((16 * 4096 * 2,), 2),
    "ids": noise("I32", (6, 5)),
    "scalar": ("F32", (), b"\x00\x00\x80\x3f"),
    "nibbles": noise("F4", (4,)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory, and the same file plain and compressed."""
    root = tmp_path_factory.mktemp("checkpoint")
    (root / "plain.safetensors").write_bytes(safetensors_bytes(MIXED, {"note": "mixed"}))
    bitforbit.compress(root / "plain.safetensors", root / "coded.safetensors", threads=1)
    build_model(root / "model")
    bitforbit.compress(root / "model", root / "packed", threads=1)
    return root


def original(name: str) -> np.ndarray:
    dtype, shape, data = MIXED[name]
    return np.frombuffer(data, dtypes.to_numpy(dtype)).reshape(shape)


@pytest.mark.parametrize("file", ["plain.safetensors", "coded.safetensors"])
def test_a_file(files: Path, file: str) -> None:
    with bitforbit.safe_open(files / file) as f:
        assert f.keys() == sorted(MIXED)
        assert f.metadata() == {"note": "mixed"}
        for name in MIXED:
            piece = f.get_slice(name)
            assert (piece.get_dtype(), tuple(piece.get_shape())) == MIXED[name][:2]
            if name != "nibbles":
                assert_bitwise_equal(f.get_tensor(name), original(name))
                assert_bitwise_equal(piece[...], original(name))
        for bad in (f.get_tensor, lambda name: f.get_slice(name)[1:2]):
            with pytest.raises(errors.UnsupportedDtypeError, match="F4"):
                bad("nibbles")
        with pytest.raises(errors.UsageError, match="absent"):
            f.get_tensor("absent")


def test_a_directory_as_safetensors_reads_it(files: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    expected = {}
    for path in (files / "model").glob("*.safetensors"):
        expected.update(load_file(path))
    with bitforbit.safe_open(str(files / "packed"), "pt", threads=1) as f:
        assert f.keys() == sorted(expected)
        for name, tensor in expected.items():
            got = f.get_tensor(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert_bitwise_equal(got.view(-1).view(torch.uint8).numpy(), tensor.view(-1).view(torch.uint8).numpy())


def index_of(data: st.DataObject, length: int) -> int | slice:
    if length and data.draw(st.booleans()):
        return data.draw(st.integers(-length, length - 1))
    bound = st.none() | st.integers(-length - 3, length + 3)
    return slice(data.draw(bound), data.draw(bound), data.draw(st.sampled_from([None, 1, 2, 7])))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_index(files: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["matrix", "experts", "vector", "ids", "scalar"]))
    whole = original(name)
    index: list[Any] = [index_of(data, n) for n in whole.shape]
    if data.draw(st.booleans()):
        begin = data.draw(st.integers(0, len(index)))
        end = data.draw(st.integers(begin, len(index)))
        index[begin:end] = [...]
    else:
        index = index[: data.draw(st.integers(0, len(index)))]
    key = index[0] if len(index) == 1 and data.draw(st.booleans()) else tuple(index)
    file = data.draw(st.sampled_from(["plain.safetensors", "coded.safetensors"]))
    with bitforbit.safe_open(files / file) as f:
        got = f.get_slice(name, check=data.draw(st.booleans()))[key]
    assert isinstance(got, np.ndarray)
    assert got.flags.c_contiguous
    assert_bitwise_equal(got, np.asarray(whole[key]))


def test_other_indices(files: Path) -> None:
    with bitforbit.safe_open(files / "coded.safetensors") as f:
        matrix = f.get_slice("matrix")
        for outside in (130, -131, (0, 200)):
            with pytest.raises(errors.SliceIndexError, match="expected an index within"):
                matrix[outside]
        for odd in ([0, 1], "name", None, 1.5, True, slice(None, None, -1), (0, 0, 0), (..., ...), np.array([1, 2])):
            with pytest.raises((errors.UsageError, TypeError)):
                matrix[odd]  # type: ignore[index]
        assert len(matrix) == 130
        assert sum(1 for _ in f.get_slice("ids")) == 6
        assert matrix[np.int64(3)].dtype == ml_dtypes.bfloat16
        with pytest.raises(TypeError):
            len(f.get_slice("scalar"))
    with pytest.raises(errors.UsageError, match="with"):
        f.get_tensor("matrix")


def test_torch(files: Path) -> None:
    torch = pytest.importorskip("torch")
    with bitforbit.safe_open(files / "coded.safetensors", framework="pt") as f:
        whole, part = f.get_tensor("matrix"), f.get_slice("matrix")[3:70:3, -5:]
        assert f.get_slice("scalar")[...].shape == ()
    assert whole.dtype == torch.bfloat16
    assert part.is_contiguous()
    assert_bitwise_equal(part.view(torch.uint16).numpy(), original("matrix").view(np.uint16)[3:70:3, -5:])


def test_torch_is_not_imported_for_numpy(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with bitforbit.safe_open(files / "packed") as f:
        f.get_tensor(f.keys()[0])
    assert "torch" not in sys.modules
    with pytest.raises(errors.MissingDependencyError, match="torch"):
        bitforbit.safe_open(files / "packed", "pt")


def test_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="framework"):
        bitforbit.safe_open(files / "packed", "jax")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(errors.GgufRefusedError):
        bitforbit.safe_open(tmp_path / "model.gguf")
    with pytest.raises(errors.GgufRefusedError):
        bitforbit.safe_open(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(errors.SourceNotFoundError):
            bitforbit.safe_open(path)
    (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": {}}))
    with pytest.raises(errors.UsageError, match="DFloat11"):
        bitforbit.safe_open(tmp_path)


def test_two_files_with_the_same_names(files: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(files / "plain.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(errors.UsageError, match=r"b\.safetensors: tensor 'matrix' is also in .*a\.safetensors"):
        bitforbit.safe_open(tmp_path)
    index = {"weight_map": dict.fromkeys(MIXED, "b.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with bitforbit.safe_open(tmp_path) as f:
        assert f.keys() == sorted(MIXED)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(errors.UsageError, match="is also in"):
        bitforbit.safe_open(tmp_path)


def test_missing_and_damaged_files(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "packed", tmp_path / "packed")
    path = tmp_path / "packed" / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    path.unlink()
    with pytest.raises(errors.MissingPartError, match="00002-of-00002"):
        bitforbit.safe_open(tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors.index.json").unlink()
    with pytest.raises(errors.MissingPartError, match="00002-of-00002"):
        bitforbit.safe_open(tmp_path / "packed")
    data[-1] ^= 1  # of the tensor whose bytes lie last, the vector in FP32
    path.write_bytes(data)
    with bitforbit.safe_open(tmp_path / "packed") as f:
        name = "model.layers.1.norm.weight"
        assert f.get_slice(name)[:5].shape == (5,)
        for read in (lambda: f.get_tensor(name), lambda: f.get_slice(name, check=True)[:5]):
            with pytest.raises(errors.ChecksumError, match="00002-of-00002"):
                read()
