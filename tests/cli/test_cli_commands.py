"""Every command: what it does, what it prints, and with which code it exits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli_models import Run, digests, one_object, write_model

import bitforbit
from bitforbit.cli import main

FIGURES = {"original_bytes", "compressed_bytes", "bits_per_weight", "seconds", "tensors"}


def test_compress_and_decompress(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(model)
    assert main(["compress", str(model), str(tmp_path / "c"), "--threads", "2"]) == 0
    shown, errors = capsys.readouterr()
    assert "bits/weight" in shown
    assert " %)" in shown
    assert not errors
    assert main(["decompress", str(tmp_path / "c"), str(tmp_path / "r"), "--sha256"]) == 0
    assert "SHA-256" in capsys.readouterr().out
    assert digests(tmp_path / "r") == before == digests(model)


def test_json_has_the_figures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = []
    for arguments in (
        ["compress", model, tmp_path / "c"],
        ["decompress", tmp_path / "c", tmp_path / "r"],
        ["verify", tmp_path / "c"],
        ["verify", tmp_path / "c", "--against", model],
        ["inspect", model],
        ["inspect", tmp_path / "c"],
    ):
        assert main([*map(str, arguments), "--json"]) == 0
        out, err = capsys.readouterr()
        assert not err
        objects.append(one_object(out))
        assert objects[-1].keys() >= FIGURES, arguments
    assert len({value["bits_per_weight"] for value in objects}) == 1
    assert 10.5 < float(str(objects[0]["bits_per_weight"])) < 11.5
    assert len({value["original_bytes"] for value in objects[:4]}) == 1
    sizes = [int(str(value["compressed_bytes"])) for value in objects[:3]]
    assert max(sizes) - min(sizes) <= (tmp_path / "c" / "bitforbit.json").stat().st_size


def test_include_exclude_and_overwrite(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for arguments in ([], ["--include", "*.mlp.*"], ["--include", "*.mlp.*", "--exclude", "*.up_proj.*"]):
        command = ["compress", str(model), str(tmp_path / "c"), *arguments, "--overwrite", "--json"]
        assert main(command) == 0
        counts.append(one_object(capsys.readouterr().out)["compressed_tensors"])
    assert counts == [16, 6, 4]


def test_single_files(model: Path, tmp_path: Path) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    assert main(["compress", str(shard), str(tmp_path / "c.safetensors"), "-q"]) == 0
    assert main(["verify", str(tmp_path / "c.safetensors")]) == 0
    assert main(["inspect", str(tmp_path / "c.safetensors"), "--json"]) == 0
    assert main(["decompress", str(tmp_path / "c.safetensors"), str(tmp_path / "r.safetensors")]) == 0
    assert (tmp_path / "r.safetensors").read_bytes() == shard.read_bytes()


@pytest.mark.skipif(not find_spec("bitforbit.archive.dfloat11"), reason="without the DFloat11 format")
def test_df11(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(model), str(tmp_path / "c"), "--format", "df11", "--json"]) == 0
    whole = one_object(capsys.readouterr().out)
    assert whole.keys() >= FIGURES
    assert 10.5 < float(str(whole["bits_per_weight"])) < 11.5
    assert main(["decompress", str(tmp_path / "c"), str(tmp_path / "r"), "--json"]) == 0
    assert one_object(capsys.readouterr().out)["bits_per_weight"] == whole["bits_per_weight"]
    (tmp_path / "units.json").write_text(json.dumps({"model\\.layers\\.\\d+": ["mlp.up_proj", "mlp.gate_proj"]}))
    units = ["--units", str(tmp_path / "units.json")]
    assert main(["compress", str(model), str(tmp_path / "few"), "--format", "df11", *units, "--json"]) == 0
    few = one_object(capsys.readouterr().out)
    assert float(str(few["bits_per_weight"])) > float(str(whole["bits_per_weight"])) + 1
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    assert list(config["dfloat11_config"]["pattern_dict"].values()) == [["mlp.up_proj", "mlp.gate_proj"]]
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert "DFloat11 model" in capsys.readouterr().out


def test_verify_fails_with_1(compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(compressed, damaged)
    shard = damaged / "model-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-70000] ^= 1
    shard.write_bytes(data)
    (damaged / "extra.txt").write_text("not part of it")
    assert main(["verify", str(damaged)]) == 1
    out, err = capsys.readouterr()
    assert "FAILED model-00002-of-00002.safetensors, tensor" in out
    assert "note: extra.txt" in out
    assert "Traceback" not in out + err
    assert main(["verify", str(damaged), "--json"]) == 1
    value = one_object(capsys.readouterr().out)
    assert value["ok"] is False
    assert value["errors"]
    (damaged / "bitforbit.json").write_text("{")
    assert main(["verify", str(damaged), "--json"]) == 1


def test_verify_against_another_model(compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_model(tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    assert main(["verify", str(compressed), "--against", str(other)]) == 1
    assert "tokenizer.json" in capsys.readouterr().out


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_abbreviates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "deep", layers=20, hidden=64)
    assert main(["inspect", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("model.layers.*.mlp.up_proj.weight (20) ") for line in lines)
    assert len(lines) < 20
    assert "would become" in lines[-1]
    assert main(["inspect", str(model), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("up_proj" in line for line in lines) == 20
    assert lines[0].split() == [
        *("tensor", "dtype", "shape", "original", "stored"),
        "bits/weight",
        "bound",
        "above",
        "it",
        "entropy",
    ]


def test_inspect_small_and_compressed(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(compressed)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj.weight  " in out
    assert ": compressed " in out


@pytest.mark.parametrize("which", ["model", "compressed"])
def test_inspect_plot(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    assert main(["inspect", str(request.getfixturevalue(which)), "--plot", str(picture), "--json"]) == 0
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 20_000


def test_inspect_plot_is_checked_first(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("picture.jpg", "absent/picture.png"):
        assert main(["inspect", str(model), "--plot", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_plot_without_matplotlib(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(model), "--plot", "picture.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# --- info, help ------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFORBIT_ISA", "scalar")
    monkeypatch.setenv("BITFORBIT_THREADS", "3")
    assert main(["info", "--json"]) == 0
    facts = one_object(capsys.readouterr().out)
    assert facts["version"] == bitforbit.__version__
    assert facts["threads"] == 3
    assert {"name": "scalar", "supported": True, "active": True} in facts["instruction_sets"]  # type: ignore[operator]
    environment = facts["environment"]
    assert isinstance(environment, dict)
    assert (environment["BITFORBIT_ISA"], environment["BITFORBIT_THREADS"]) == ("scalar", "3")
    assert {"planes", "raw"} <= set(facts["codecs"])  # type: ignore[call-overload]
    gpu = facts["gpu"]
    assert isinstance(gpu, dict)
    assert gpu["problem"] is None or (gpu["problem"].startswith("expected") and "the CPU" in gpu["problem"])
    assert bool(gpu["gpus"]) or gpu["problem"]
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("GPUs", "scalar", "active", "BITFORBIT_THREADS", "numpy", "planes"):
        assert word in out
    monkeypatch.setenv("BITFORBIT_ISA", "mmx")
    assert main(["info"]) == 2
    assert "mmx" in capsys.readouterr().err


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout == f"bitforbit {bitforbit.__version__}\n"
    shown = run("--help")
    assert shown.returncode == 0
    for name in ("compress", "decompress", "verify", "inspect", "info", "demo"):
        assert name in shown.stdout
        assert run(name, "--help").returncode == 0
    assert "[rows," in run("decompress", "--help").stdout  # not taken for markup
    module = subprocess.run(
        [sys.executable, "-m", "bitforbit", "--version"], check=True, capture_output=True, text=True
    )
    assert module.stdout == f"bitforbit {bitforbit.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from bitforbit.cli import main; main(['--help'])\n"
        "heavy = {'numpy', 'torch', 'matplotlib', 'huggingface_hub', 'ml_dtypes', 'bitforbit.archive'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
