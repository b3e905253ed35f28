"""Which server ``bitforbit serve`` starts, and what it refuses. test_cli_serve_http and tests/vllm_plugin ask one."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from bitforbit.cli import main, serve
from bitforbit.cli.serve_gpus import option, parallel
from bitforbit.errors import MissingDependencyError, NotCompressedError, SourceNotFoundError, UsageError

SERVING = {"torch", "transformers", "pydantic", "fastapi", "uvicorn", "openai", "psutil"}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def compressed(plain: Path) -> Path:
    make_compressed(plain)
    return plain


def make_compressed(directory: Path) -> None:
    (directory / "bitforbit.json").write_text("{}")
    (directory / "config.json").write_text('{"quantization_config": {"quant_method": "bitforbit"}}')


def choose(
    directory: Path, installed: set[str], mode: str = "exact", more: Sequence[str] = (), gpus: Sequence[int] = ()
) -> serve.Server:
    return serve.choose(directory, "m", "127.0.0.1", 8001, mode, more, installed.__contains__, lambda: gpus)


def test_vllm_takes_both_kinds(plain: Path) -> None:
    server = choose(plain, {"vllm", *SERVING}, "fused", ("--tensor-parallel-size", "2"))
    text = " ".join(server.arguments)
    assert text.startswith(f"-m vllm.entrypoints.cli.main serve {plain} --served-model-name m")
    assert text.endswith("--host 127.0.0.1 --port 8001 --quantization bitforbit --tensor-parallel-size 2")
    assert server.environment["BITFORBIT_VLLM_MODE"] == "fused"
    assert server.environment["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"].split(",")[-1] == "BITFORBIT_VLLM_MODE"
    make_compressed(plain)
    assert "--quantization" not in choose(plain, {"vllm"}).arguments


def test_transformers_where_there_is_no_vllm(compressed: Path) -> None:
    arguments = choose(compressed, SERVING).arguments
    assert list(arguments[:4]) == ["-m", "bitforbit.cli.serve_transformers", "serve", str(compressed)]
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


def test_names_of_the_model(compressed: Path) -> None:
    assert choose(compressed, {"vllm"}).name == "m"
    server = choose(compressed, {"vllm"}, more=("--served-model-name=llama",))
    assert server.name == "llama"
    assert " ".join(server.arguments).count("--served-model-name") == 1
    assert choose(compressed, SERVING).name == str(compressed)
    with pytest.raises(UsageError, match="no other name"):
        choose(compressed, SERVING, more=("--served-model-name", "llama"))
    compressed.rename(compressed.with_name("a@b"))
    with pytest.raises(UsageError, match="no path with an @"):
        choose(compressed.with_name("a@b"), SERVING)


def test_options_of_other_commands(compressed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for given in (["--kv", "4"], ["--kv=4"], ["--kv-group", "32"]):
        assert main(["serve", str(compressed), *given]) == 2
        assert f"error: {given[0].partition('=')[0]}: servers have caches of their own" in capfd.readouterr().err
    serve.refuse(["--kv-cache-dtype", "fp8"])


def test_a_port_in_use(compressed: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} of 127\.0\.0\.1 is in use"):
            serve.check_port("127.0.0.1", port)
    serve.check_port("127.0.0.1", port)
    with pytest.raises(UsageError, match="expected an address of this machine"):
        serve.check_port("203.0.113.1", port)


def test_options_as_vllm_reads_them() -> None:
    arguments = ["--max-model-len", "1k", "--a=b", "--tensor_parallel_size=2", "--flag", "--a", "c", "-tp", "4"]
    found = {name: option(arguments, name) for name in ("--max-model-len", "--a", "--flag", "-tp", "--none")}
    assert found == {"--max-model-len": "1k", "--a": "c", "--flag": "", "-tp": "4", "--none": None}
    assert option(arguments, "--tensor-parallel-size") == "2"


GIB = 1 << 30
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "more", "added", "told"),
    [
        ([], [], [], None),
        ([192 * GIB] * 8, [], [], None),
        ([80 * GIB] * 8, [], ["--tensor-parallel-size", "2"], "--tensor-parallel-size 2 added"),
        ([80 * GIB] * 3, ["--max-model-len", "8k"], ["--tensor-parallel-size", "2"], "8,000 tokens take about"),
        ([80 * GIB] * 8, ["-tp", "4"], [], None),
        ([80 * GIB] * 8, ["--distributed-executor-backend", "ray"], [], None),
        ([24 * GIB] * 2, [], ["--tensor-parallel-size", "2"], "2 GPUs are not enough by estimate; the weights alone"),
        ([112 * GIB], [], [], "1 GPU is not enough by estimate; --max-model-len "),
    ],
)
def test_as_many_gpus_as_the_model_needs(
    plain: Path, gpus: list[int], more: list[str], added: list[str], told: str | None
) -> None:
    (plain / "config.json").write_text(json.dumps(LLAMA_70B))
    got, why = parallel(plain, "exact", more, gpus)
    assert got == added
    assert (why is None) == (told is None)
    assert told is None or told in str(why)
    if added:
        arguments = choose(plain, {"vllm"}, more=more, gpus=gpus).arguments
        assert arguments[arguments.index(added[0]) + 1] == added[1]


def test_no_estimate_no_advice(plain: Path) -> None:
    assert parallel(plain, "exact", [], [80 * GIB]) == ([], None)


def test_the_example_for_two_nodes_says_how_it_is_used() -> None:
    script = Path(__file__).parents[2] / "examples" / "serve_405b.sh"
    for arguments in ([], ["one"], ["all", "DIR"]):
        run = subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stdout) == (2, "")
        assert "serve_405b.sh worker HEAD" in run.stderr
