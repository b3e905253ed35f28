"""Which server ``bitforbit serve`` starts, and what it refuses. tests/vllm_plugin asks one over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitforbit.cli import serve
from bitforbit.errors import MissingDependencyError, NotCompressedError, SourceNotFoundError, UsageError

SERVING = {"torch", "transformers", "pydantic", "fastapi", "uvicorn", "openai"}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def compressed(plain: Path) -> Path:
    (plain / "bitforbit.json").write_text("{}")
    return plain


def choose(directory: Path, installed: set[str], mode: str = "exact", more: tuple[str, ...] = ()) -> serve.Server:
    return serve.choose(directory, "m", "127.0.0.1", 8001, mode, more, installed.__contains__)


def test_vllm_takes_both_kinds(plain: Path) -> None:
    server = choose(plain, {"vllm", *SERVING}, "fused", ("--tensor-parallel-size", "2"))
    text = " ".join(server.arguments)
    assert text.startswith(f"-m vllm.entrypoints.cli.main serve {plain} --served-model-name m")
    assert text.endswith("--host 127.0.0.1 --port 8001 --quantization bitforbit --tensor-parallel-size 2")
    assert server.environment == {"BITFORBIT_VLLM_MODE": "fused"}
    (plain / "bitforbit.json").write_text("{}")
    assert "--quantization" not in choose(plain, {"vllm"}).arguments


def test_transformers_where_there_is_no_vllm(compressed: Path) -> None:
    arguments = choose(compressed, SERVING).arguments
    assert list(arguments[:4]) == ["-m", "transformers.cli.transformers", "serve", str(compressed)]
    with pytest.raises(UsageError, match="expected mode exact"):
        choose(compressed, SERVING, "fused")
    (compressed / "bitforbit.json").unlink()
    with pytest.raises(NotCompressedError, match="compress it first"):
        choose(compressed, SERVING)


def test_says_what_to_install(compressed: Path) -> None:
    for installed in (set(), SERVING - {"uvicorn"}):
        with pytest.raises(MissingDependencyError, match="pip install vllm"):
            choose(compressed, installed)


def test_refuses_what_no_server_loads(plain: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"config\.json"):
        choose(plain / "absent", {"vllm"})
    (plain / "config.json").write_text(json.dumps({"dfloat11_config": {}}))
    with pytest.raises(UsageError, match="DFloat11"):
        choose(plain, {"vllm"})
    assert "serve" in choose(plain, SERVING).arguments
