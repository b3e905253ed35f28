"""The examples run."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_damaged_files(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(EXAMPLES / "damaged_files.py"))
    assert len(module["DAMAGE"]) == 10
    assert module["main"]() == 0
    assert capsys.readouterr().out.count("Error:") == 10


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert runpy.run_path(str(EXAMPLES / "generate.py"))["main"]() == 0
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("the same tokens") == 2


def test_kv_cache(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert runpy.run_path(str(EXAMPLES / "kv_cache.py"))["main"]() == 0
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("tokens the same") == 3


def test_long_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert runpy.run_path(str(EXAMPLES / "long_prefill.py"))["main"](["--tokens", "256"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("loss") == 7


def test_diffusers_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from bitforbit.integrations.autoload import autoload

    autoload()  # what torch does where the package is installed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert runpy.run_path(str(EXAMPLES / "diffusers_pipeline.py"))["main"]([]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "the same image" in capsys.readouterr().out
