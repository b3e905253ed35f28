"""Models from the Hub, against a server on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_models import Run, digests
from hub_server import COMMIT, Hub

from bitforbit.cli import main
from bitforbit.cli.source import needed, resolve


@pytest.fixture
def hub(model: Path, tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (pickled / "config.json").write_text("{}")
    full = tmp_path / "full"
    full.mkdir()
    for path in model.iterdir():
        (full / path.name).write_bytes(path.read_bytes())
    for name in ("pytorch_model.bin", "consolidated.safetensors", ".gitattributes", "model.onnx"):
        (full / name).write_bytes(b"not needed")
    models = {"maker/tiny": full, "maker/pickled": pickled}
    with Hub(models).running() as server:
        yield server


def environment(hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}


@pytest.mark.parametrize("name", ["maker/tiny", "maker/tiny@v1", f"maker/tiny@{COMMIT}"])
def test_round_trip_from_the_hub(hub: Hub, run: Run, model: Path, tmp_path: Path, name: str) -> None:
    done = run("compress", name, tmp_path / "c", **environment(hub))
    assert done.returncode == 0, done.stderr
    assert f"{name} is cached in {tmp_path / 'hf'}" in done.stderr
    assert sorted(hub.fetched) == sorted(path.name for path in model.iterdir())
    assert run("verify", tmp_path / "c", "--against", model).returncode == 0
    assert run("decompress", tmp_path / "c", tmp_path / "r").returncode == 0
    assert digests(tmp_path / "r") == digests(model)


def test_the_cache_serves_without_the_hub(hub: Hub, run: Run, tmp_path: Path) -> None:
    done = run("inspect", "maker/tiny", "--json", **environment(hub))
    assert done.returncode == 0
    assert json.loads(done.stdout)["tensors"]
    assert not done.stderr
    fetched = len(hub.fetched)
    assert run("inspect", "maker/tiny", "--json", **environment(hub)).returncode == 0
    assert len(hub.fetched) == fetched
    gone = {**environment(hub), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run("inspect", "maker/tiny", "--json", **gone).returncode == 0
    done = run("inspect", "maker/other", **gone)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1
    assert run("inspect", "maker/tiny", "--json", **environment(hub), HF_HUB_OFFLINE="1").returncode == 0


def test_a_compressed_model_on_the_hub(hub: Hub, run: Run, model: Path, tmp_path: Path) -> None:
    """All its files are fetched, whatever their names: each belongs to the original."""
    odd = tmp_path / "odd"
    odd.mkdir()
    for path in model.iterdir():
        (odd / path.name).write_bytes(path.read_bytes())
    (odd / "notes.xyz").write_text("kept")
    assert run("compress", odd, tmp_path / "c").returncode == 0
    hub.models["maker/small"] = tmp_path / "c"
    assert run("decompress", "maker/small", tmp_path / "r", **environment(hub)).returncode == 0
    assert digests(tmp_path / "r") == digests(odd)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("maker/absent", "SourceNotFoundError", "neither a local path"),
        ("maker/tiny@v9", "SourceNotFoundError", "no such revision"),
        ("maker/pickled", "PickleRefusedError", "pytorch_model.bin"),
        ("maker/ti..ny", "SourceNotFoundError", "neither a local path"),
    ],
)
def test_errors(hub: Hub, run: Run, tmp_path: Path, name: str, kind: str, words: str) -> None:
    done = run("compress", name, tmp_path / "c", "--json", **environment(hub))
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["type"] == kind
    assert words in error["message"]
    assert not hub.fetched


def test_without_huggingface_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    assert main(["compress", "maker/tiny", "c"]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


def test_local_paths_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "maker" / "tiny").mkdir(parents=True)
    for source in ("maker/tiny", "./a/b", "/a/b", "a/b/c", "a", "../a", "a/b@"):
        assert resolve(source, silent=True) == Path(source)


def test_which_files_are_needed() -> None:
    names = [
        *("model-1.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "merges.txt"),
        *("LICENSE", "README.md", "modeling.py", "chat_template.jinja", "unet/model.safetensors", "unet/config.json"),
    ]
    others = [
        *(".gitattributes", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "q4.gguf"),
        *("original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", "consolidated.safetensors"),
        *("picture.png", "consolidated-00001-of-00002.safetensors"),
    ]
    assert needed([*names, *others]) == names
    assert needed(["consolidated.safetensors", "params.json"]) == ["consolidated.safetensors", "params.json"]
    assert needed(["bitforbit.json", *others]) == ["bitforbit.json", *others]
