"""``bitforbit run`` on the packaged model, in every form."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_models import one_object
from text_models import PROMPT, edit, make_all

from bitforbit.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def reference(models: dict[str, Path]) -> list[int]:
    """Twelve tokens that stock transformers chooses greedily."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(models["plain"], dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["plain"])
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["native", "plain", "df11"])
def test_exact_writes_the_bf16_models_tokens(
    kind: str, models: dict[str, Path], reference: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(models[kind]), "-p", PROMPT, "-n", "12", "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    value = one_object(out)
    assert value["token_ids"] == reference
    assert value["stored_as"] == {"native": "bitforbit", "df11": "dfloat11"}.get(kind, kind)
    assert (value["mode"], value["stopped"], value["new_tokens"]) == ("exact", "length", 12)
    for name in ("tokens_per_second", "first_token_seconds", "load_seconds", "peak_bytes"):
        assert float(str(value[name])) > 0
    assert 0.6 < float(str(value["weight_bytes"])) / 15_735_808 < 0.75
    ran = value["ran"]
    assert isinstance(ran, dict)
    assert ran["linears"]["fused"] == 0
    assert sum(ran["linears"].values()) > 0
    assert sum(ran["linears_share"].values()) == pytest.approx(1)


def test_text_streams_to_standard_output(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(models["native"]), "-p", PROMPT, "-n", "12", "--json"]) == 0
    text = str(one_object(capsys.readouterr().out)["text"])
    assert main(["run", str(models["native"]), "-p", PROMPT, "-n", "12", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n" * (not text.endswith("\n"))
    for words in (
        "tokens/s with 1 thread",
        "first token",
        "loading",
        "memory",
        "linears",
        "the bits of the BF16 model",
    ):
        assert words in err
    assert main(["run", str(models["native"]), "-p", PROMPT, "-n", "12", "-q"]) == 0
    assert capsys.readouterr() == (out, "")


def test_fused(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(models["native"]), "-p", PROMPT, "-n", "4", "--mode", "fused"]) == 0
    err = capsys.readouterr().err
    assert "order of our own" in err
    assert "100.0 % fused (" in err


def test_prompt_from_standard_input(
    models: dict[str, Path], reference: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert main(["run", str(models["native"]), "-p", "-", "-n", "12", "--json"]) == 0
    assert one_object(capsys.readouterr().out)["token_ids"] == reference


def test_sampling_follows_the_seed(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        command = ["run", str(models["native"]), "-p", PROMPT, "-n", "12", "--temperature", "0.9", "--seed", seed]
        assert main([*command, "--json"]) == 0
        texts.append(one_object(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_chat_template(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for extra in ([], ["--chat"]):
        assert main(["run", str(models["chat"]), "-p", PROMPT, "-n", "2", "--json", *extra]) == 0
        counts.append(int(str(one_object(capsys.readouterr().out)["prompt_tokens"])))
    assert counts[0] < counts[1]
    assert main(["run", str(models["native"]), "-p", PROMPT, "--chat"]) == 2
    assert "chat template" in capsys.readouterr().err


# --- errors ----------------------------------------------------------------------------------------------------------


def _error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main([*arguments, "--json"]) == 2
    error = one_object(capsys.readouterr().out)["error"]
    assert isinstance(error, dict)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == f"error: {error['message']}\n"
    return error["type"], error["message"]


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["chat"], ["bench"]])
def test_directories_that_are_none(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = command
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for place, kind in (
        (tmp_path / "absent", "SourceNotFoundError"),
        (tmp_path, "SourceNotFoundError"),
        (file, "UsageError"),
    ):
        assert _error([name, str(place), *rest], capsys)[0] == kind
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    kind, message = _error([name, str(tmp_path), *rest], capsys)
    assert kind == "UsageError"
    assert "fp8" in message
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert _error([name, str(tmp_path), *rest], capsys)[0] == "PickleRefusedError"


def test_no_generation_head(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "encoder"
    shutil.copytree(models["plain"], model)
    edit(model / "config.json", architectures=["BertModel"], model_type="bert")
    kind, message = _error(["run", str(model), "-p", "x"], capsys)
    assert kind == "NoGenerationHeadError"
    assert "BertModel" in message


def test_missing_weights_are_no_random_weights(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "deeper"
    shutil.copytree(models["plain"], model)
    edit(model / "config.json", num_hidden_layers=5)
    _, message = _error(["run", str(model), "-p", "x"], capsys)
    assert "layers.4." in message


def test_no_tokenizer(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "mute"
    shutil.copytree(models["native"], model)
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert _error(["run", str(model), "-p", "x"], capsys)[0] == "NoTokenizerError"
    assert _error(["chat", str(model)], capsys)[0] == "NoTokenizerError"


def test_prompts_that_do_not_fit(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    kind, message = _error(["run", str(models["native"]), "-p", "x y " * 2000], capsys)
    assert kind == "PromptTooLongError"
    assert "1024" in message
    assert _error(["run", str(models["native"]), "-p", "x", "--temperature", "nan"], capsys)[0] == "UsageError"
    assert main(["run", str(models["native"]), "-p", "x y " * 500, "-n", "100000", "--json"]) == 0
    value = one_object(capsys.readouterr().out)
    assert int(str(value["prompt_tokens"])) + int(str(value["new_tokens"])) == 1024


def test_without_torch(models: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from bitforbit.cli import main\n"
        f"sys.exit(max(main([name, {str(models['native'])!r}, *rest]) for name, *rest in "
        "(['run', '-p', 'x'], ['chat'], ['bench'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all("pip install 'torch>=2.11'" in line for line in lines), lines


@pytest.mark.parametrize("command", ["run", "chat", "bench"])
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (["--device", "cuda"], "Gpu", "CPU"),
        (["--device", "cuda:1"], "Gpu", "CPU"),
        (["--device", "tpu"], "UsageError", "auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:x"], "UsageError", "got 'cuda:x'"),
        (["--device", "cpu", "--runtime", "tiles"], "UsageError", "expected a GPU"),
        (["--runtime", "fast"], "UsageError", "one of auto, planes, tiles, df11, got 'fast'"),
    ],
)
def test_devices_that_cannot_be_used(
    command: str, options: list[str], kind: str, words: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "Gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    prompt = ["-p", PROMPT] if command == "run" else []
    assert main([command, str(models["native"]), *prompt, *options, "--json"]) == 2
    error = one_object(capsys.readouterr().out)["error"]
    assert isinstance(error, dict)
    assert str(error["type"]).startswith(kind)
    assert words in str(error["message"])


def test_on_a_cpu_by_name(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-n", "2", "--json", "--device", "cpu", "--runtime", "planes"]
    assert main(["run", str(models["native"]), "-p", PROMPT, *options]) == 0
    value = one_object(capsys.readouterr().out)
    assert (value["device"], value["runtime"], value["gpu_peak_bytes"]) == ("cpu", "planes", None)
