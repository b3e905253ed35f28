"""``bitforbit plan``: configs, directories, the Hub; tables, JSON, pictures; what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_models import Run
from hub_server import Hub

from bitforbit.cli import main

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}  # fmt: skip
TINY = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def facts(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--gpu", "4090", "--kv", "16,4"]) == 0
    text = capsys.readouterr().out
    assert "llama, 8,030,261,248 parameters, BF16 (config.json)" in text
    assert "10.8 bits per weight (estimate)" in text
    rows = [line.split()[:2] for line in text.splitlines() if line.startswith(("bf16 ", "exact ", "fused "))]
    assert rows == [[mode, kv] for mode in ("bf16", "exact", "fused") for kv in ("16", "4")]
    assert "upper estimate" in text
    assert "lossy" in text
    assert "does not fit" not in text


def test_the_guide_shows_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "plan.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, text in _configs(guide).items():
        Path(name).write_text(text)
    blocks = guide.split("```\n$ bitforbit ")[1:]
    assert len(blocks) >= 2
    for block in blocks:
        command, _, printed = block.split("```")[0].partition("\n")
        assert main(command.split()) == 0
        assert capsys.readouterr().out == printed


def _configs(guide: str) -> dict[str, str]:
    parts = guide.split("<!-- config ")[1:]
    return {part.split(" ")[0]: part.partition(" ")[2].partition(" -->")[0] for part in parts}


def test_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = facts(capsys, config, "--gpu", "H200", "--kv", "16,k4v2", "--context", "32k", "--batch", 2)
    assert plan["parameters"] == 8030261248
    assert plan["fits"]
    assert not plan["advice"]
    first = plan["settings"][0]
    assert (first["mode"], first["kv"], first["context"], first["lossy"]) == ("bf16", "16", 32768, False)
    assert first["kv_bytes"] == 2 * 32768 * 131072
    parts = ("weights_bytes", "scratch_bytes", "kv_bytes", "activations_bytes")
    assert first["total_bytes"] == sum(first[name] for name in parts)
    assert [s["lossy"] for s in plan["settings"]] == [False, True] * 3


def test_a_plain_and_a_compressed_directory(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain").mkdir()
    for path in model.iterdir():
        (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "plain" / "config.json").write_text(json.dumps(TINY))
    assert main(["compress", str(tmp_path / "plain"), str(tmp_path / "coded"), "--json"]) == 0
    capsys.readouterr()
    plain, coded = (facts(capsys, tmp_path / name, "--gpu", "CPU:1GB") for name in ("plain", "coded"))
    assert plain["parameters"] == coded["parameters"]
    assert "estimate" in plain["disk_from"]
    assert "the compressed tensors" in coded["disk_from"]
    stored = sum(path.stat().st_size for path in (tmp_path / "coded").glob("*.safetensors"))
    exact = next(s for s in coded["settings"] if s["mode"] == "exact")
    assert exact["weights_bytes"] == pytest.approx(stored, rel=0.03)  # headers
    assert coded["settings"][0]["weights_bytes"] == plain["original_bytes"] == plain["settings"][0]["weights_bytes"]


def test_a_dfloat11_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bitforbit
    from bitforbit.demo import model_path

    bitforbit.decompress(model_path(), tmp_path / "plain")
    bitforbit.compress(tmp_path / "plain", tmp_path / "df11", format="df11")
    plan = facts(capsys, tmp_path / "df11", "--gpu", "80GB", "--mode", "df11", "--kv", "16")
    stored = sum(path.stat().st_size for path in (tmp_path / "df11").glob("*.safetensors"))
    assert plan["settings"][0]["all_weights_bytes"] == pytest.approx(stored, rel=0.02)


def test_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    from bitforbit.demo import model_path

    assert facts(capsys, model_path(), "--gpu", "CPU:1GB")["parameters"] == 7867776


def test_many_gpus(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--gpus alone is layer by layer; with --tp or --pp it says the rest."""
    cases = [(["--gpus", 4], (1, 4)), (["--gpus", 8, "--tp", 2], (2, 4)), (["--tp", 2, "--pp", 3], (2, 3))]
    for arguments, expected in cases:
        plan = facts(capsys, config, *arguments)
        assert (plan["tensor_parallel"], plan["pipeline_parallel"]) == expected


def test_what_does_not_fit(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(config), "--gpu", "16GB", "--mode", "exact", "--kv", "16", "--context", "100000"]
    assert main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit; ")]
    assert "tokens fit with exact, KV 16" in lines[0]
    assert lines[-1] == "does not fit; 3 such GPUs fit (pipeline 3)"


def test_offload(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [config, "--gpu", "10GB", "--kv", "16", "--context", "2k"]
    plan = facts(capsys, *arguments, "--host", "2GB", "--link", "20", "--disk", "5")
    assert (plan["host_bytes"], plan["link_bytes_per_second"], plan["disk_bytes_per_second"]) == (2 * 10**9, 2e10, 5e9)
    assert not plan["fits"]
    found = {row["mode"]: row for row in plan["offload"]}
    assert list(found) == ["bf16", "exact", "fused"]
    exact = found["exact"]
    assert exact["blocks"] == 33 == sum(exact["resident_blocks"]) + exact["streamed_blocks"]
    assert exact["host_bytes"] <= 2 * 10**9 < exact["host_bytes"] + exact["disk_bytes"]
    assert exact["total_bytes"] <= plan["usable_bytes"]
    assert exact["over_bf16"] == exact["tokens_per_second_prediction"] / found["bf16"]["tokens_per_second_prediction"]
    assert main(["plan", *map(str, arguments), "--host", "2GB"]) == 0
    text = capsys.readouterr().out
    assert "a link of unknown speed (--link), disk 3.5 GB/s (assumed)" in text
    assert f"{sum(exact['resident_blocks'])} of 33" in text
    sheet = facts(capsys, config, "--gpu", "4090")
    assert sheet["link_bytes_per_second"] == 3.2e10
    assert sheet["offload"] == []


def test_context_max(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = facts(capsys, config, "--gpu", "4090", "--context", "max", "--kv", "16")["settings"]
    assert [s["context"] for s in settings] == [s["longest_context"] for s in settings]
    assert settings[0]["context"] < settings[1]["context"] <= settings[2]["context"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "list"]) == 0
    assert "3,350 GB/s" in capsys.readouterr().out
    assert main(["plan", "x", "--gpu", "list", "--json"]) == 0
    assert {"H100", "RTX4090"} <= {gpu["name"] for gpu in json.loads(capsys.readouterr().out)["gpus"]}


def test_plot(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for i, arguments in enumerate((["--gpu", "4090"], ["--gpu", "1GB", "--context", "max", "--kv", "16"])):
        picture = tmp_path / f"{i}.png"
        assert main(["plan", str(config), *arguments, "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "picture in" in capsys.readouterr().out


def test_rare_families_by_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    made = transformers.AutoConfig.for_model(
        "olmo2", hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=200
    )
    made.save_pretrained(tmp_path)
    plan = facts(capsys, tmp_path / "config.json")
    model = transformers.AutoModelForCausalLM.from_config(made)
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["sizes_from"] == "config.json, by transformers"


def test_no_torch(config: Path) -> None:
    """Known families need neither torch nor transformers."""
    import subprocess

    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from bitforbit.cli import main
raise SystemExit(main(["plan", {str(config)!r}]))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


@pytest.fixture
def hub(model: Path, tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    full = tmp_path / "full"
    full.mkdir()
    for path in model.iterdir():
        (full / path.name).write_bytes(path.read_bytes())
    (full / "config.json").write_text(json.dumps(TINY))
    with Hub({"maker/tiny": full}).running() as server:
        yield server


def test_the_hub(hub: Hub, run: Run, tmp_path: Path) -> None:
    """Weights are not fetched: headers alone."""
    environment = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    done = run("plan", "maker/tiny", "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sizes_from"] == "headers of the safetensors files"
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    missing = run("plan", "maker/none", **environment)
    assert missing.returncode == 2
    assert "maker/none: neither a local path nor a public model on the Hub" in missing.stderr


def test_without_network(hub: Hub, run: Run) -> None:
    """What was asked for before is known still; else one line says that the Hub cannot be reached, at once."""
    environment = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    assert run("plan", "maker/tiny", "--json", **environment).returncode == 0
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    again = run("plan", "maker/tiny", "--json", **environment)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["sizes_from"] == "config.json"
    never = run("plan", "maker/none", **environment)
    assert never.returncode == 2
    assert "the Hub cannot be reached" in never.stderr
    assert len(never.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "gtx"], "--gpu: expected one of B200"),
        (["--kv", "3"], "expected 2, 4 or 8"),
        (["--kv", "q4"], "--kv: expected 16, 8, 4, 2"),
        (["--context", "0"], "--context: expected a number"),
        (["--context", "-5"], "--context: expected a number"),
        (["--context", "many"], "--context: expected a number"),
        (["--mode", "int4"], "--mode: expected some of bf16"),
        (["--tp", "3"], "possible: 1, 2, 4, 8, 16, 32"),
        (["--tp", "5", "--gpus", "10"], "32 heads and the MLPs' width of 14336"),
        (["--pp", "40"], "at most one GPU per layer"),
        (["--gpus", "8", "--tp", "3"], "--gpus 8: expected --tp times --pp"),
        (["--gpus", "8", "--tp", "2", "--pp", "2"], "--gpus 8: expected --tp times --pp"),
        (["--bits-per-weight", "0"], "bits per weight above 0"),
        (["--host", "64"], "--host: expected a size such as 64GB"),
        (["--link", "0"], "--link: expected GB/s above 0"),
        (["--disk", "-1"], "--disk: expected GB/s above 0"),
        (["--reserve", "1000"], "--reserve: expected less than"),
        (["--kv-group", "48"], "group: expected 32"),
        (["--plot", "picture.svg"], "expected the name of a .png file"),
    ],
)
def test_refused(config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert main(["plan", str(config), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{", "expected a JSON object"),
        ("{}", "model_type: expected one of llama"),
        ('{"model_type": "llama"}', "without hidden_size"),
        ('{"model_type": "no-such-family", "hidden_size": 8}', "got 'no-such-family'; give a directory"),
    ],
)
def test_refused_configs(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["plan", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_refused_places(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = next(model.glob("*.safetensors"))
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "config.json"), (weights, "got a file")):
        assert main(["plan", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "expected a model" in capsys.readouterr().err
