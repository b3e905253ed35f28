"""Every architecture, loaded from a native directory and compressed while loading: the outputs of the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bitforbit
from bitforbit.nn import compressed_parameters
from integrations import zoo
from integrations.conftest import Directories


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def compressed_names(model: Any) -> set[str]:
    return {f"{prefix}.{name}" for prefix, module in model.named_modules() for name in compressed_parameters(module)}


def assert_same_outputs(model: Any, reference: Any, name: str) -> None:
    assert torch.equal(zoo.logits(model, name, 1), zoo.logits(reference, name, 1))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_native_directory(name: str, directories: Directories, threads: int) -> None:
    plain, native = directories(name)
    reference = zoo.auto_class(name).from_pretrained(plain)
    model = zoo.auto_class(name).from_pretrained(native)
    assert {n for n, p in reference.named_parameters() if p.dim() >= 2 and p.numel() >= 4096} <= compressed_names(model)
    for batch in (1, 4):
        assert torch.equal(zoo.logits(model, name, batch), zoo.logits(reference, name, batch)), batch
        if name in zoo.CAUSAL and threads == 1:
            assert torch.equal(zoo.generated(model, name, batch), zoo.generated(reference, name, batch))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_compress_while_loading(name: str, directories: Directories) -> None:
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    model = auto.from_pretrained(plain, quantization_config=bitforbit.BitforbitConfig())
    assert compressed_names(model) == compressed_names(auto.from_pretrained(native))
    assert_same_outputs(model, auto.from_pretrained(plain), name)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_fused_mode_is_close(name: str, directories: Directories) -> None:
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    model = auto.from_pretrained(native, quantization_config=bitforbit.BitforbitConfig(mode="fused"))
    expected = zoo.logits(auto.from_pretrained(plain), name, 4).float()
    error = (zoo.logits(model, name, 4).float() - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.mark.parametrize("name", zoo.MODELS)
def test_saved_and_loaded_again(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    auto.from_pretrained(native).save_pretrained(tmp_path / "saved")
    assert bitforbit.verify(tmp_path / "saved").ok
    bitforbit.decompress(tmp_path / "saved", tmp_path / "restored")
    assert_same_files(plain, tmp_path / "restored")
    assert_same_outputs(auto.from_pretrained(tmp_path / "saved"), auto.from_pretrained(plain), name)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_dequantized(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    reference, model = auto.from_pretrained(plain), auto.from_pretrained(native).dequantize()
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in reference.named_modules()}
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(plain, tmp_path / "saved")
    assert_same_outputs(model, reference, name)


def assert_same_files(plain: Path, restored: Path) -> None:
    """The same weights under the same names in the same files, byte for byte."""
    assert sorted(p.name for p in plain.iterdir()) == sorted(p.name for p in restored.iterdir())
    for path in plain.glob("*.safetensors"):
        assert path.read_bytes() == (restored / path.name).read_bytes()
