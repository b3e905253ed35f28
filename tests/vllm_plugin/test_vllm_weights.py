"""What the loader gets of a compressed directory, and what it is told of damage; the method's options."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from safetensors.torch import load_file  # noqa: E402

from bitforbit.errors import ChecksumError, UnsupportedVersionError, UsageError  # noqa: E402
from bitforbit.integrations.vllm.config import BitforbitQuantizationConfig  # noqa: E402
from bitforbit.integrations.vllm.plugin import register  # noqa: E402
from bitforbit.integrations.vllm.weights import restored  # noqa: E402
from torch_helpers import assert_same_bits  # noqa: E402


def shard(directory: Path) -> str:
    (path,) = directory.glob("*.safetensors")
    return str(path)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_original_tensors(models: Path, name: str) -> None:
    expected = load_file(shard(models / name))
    found = restored([shard(models / f"{name}-packed")])
    assert found is not None
    tensors = dict(found)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert_same_bits(tensor, expected[key])
    assert restored([shard(models / name)]) is None


def test_experts_of_others_are_not_read(models: Path) -> None:
    found = restored([shard(models / "mixtral-packed")], experts={1})
    assert found is not None
    names = [name for name, _ in found]
    assert any(".experts.1." in name for name in names)
    assert not any(f".experts.{other}." in name for other in (0, 2, 3) for name in names)


def test_damage(models: Path, tmp_path: Path) -> None:
    data = bytearray(Path(shard(models / "llama-packed")).read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(data)
    found = restored([str(damaged)])
    assert found is not None
    with pytest.raises(ChecksumError, match="damaged"):
        [tensor.clone() for _, tensor in found]


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BitforbitQuantizationConfig().mode == "exact"
    assert BitforbitQuantizationConfig.from_config({"quant_method": "bitforbit", "mode": "fused"}).mode == "fused"
    monkeypatch.setenv("BITFORBIT_VLLM_MODE", "fused")
    assert BitforbitQuantizationConfig().mode == "fused"
    monkeypatch.setenv("BITFORBIT_VLLM_MODE", "quick")
    with pytest.raises(UsageError, match="expected a mode among"):
        BitforbitQuantizationConfig()
    with pytest.raises(UnsupportedVersionError):
        BitforbitQuantizationConfig.from_config({"format_version": 9})


def test_registering_again_changes_nothing() -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    register()
    read = DefaultModelLoader._get_weights_iterator
    register()
    assert DefaultModelLoader._get_weights_iterator is read
