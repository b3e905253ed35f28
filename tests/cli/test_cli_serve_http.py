"""``bitforbit serve`` with transformers, end to end: asked with OpenAI's client, stopped, killed.

What else may become of its processes: test_cli_supervise.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bitforbit import decompress, demo
from helpers.server import Served, assert_gone, environment_with_source, free_port, serving

_NEEDED = ("torch", "transformers", "fastapi", "uvicorn", "openai", "psutil")
pytestmark = [
    pytest.mark.skipif(not all(map(find_spec, _NEEDED)), reason="needs transformers and its server"),
    pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM would be started: see tests/vllm_plugin"),
]

PROMPT = "def add(a, b):"
MESSAGES = [{"role": "user", "content": "def multiply(a, b):"}]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
TOKENS = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, ``compressed`` and ``plain``, which both have a chat template."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(demo.model_path(), root / "compressed")
    decompress(root / "compressed", root / "plain")
    for name in ("compressed", "plain"):
        (root / name / "chat_template.jinja").write_text(TEMPLATE)
    return root


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, str]:
    """What the plain model generates, by endpoint."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "plain", dtype="auto")

    def generate(ids: Any) -> str:
        made = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        text: str = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    options = {"return_tensors": "pt", "return_dict": True, "add_generation_prompt": True}
    return {
        "completion": generate(tokenizer(PROMPT, return_tensors="pt")),
        "chat": generate(tokenizer.apply_chat_template(MESSAGES, **options)),
    }


@pytest.fixture(scope="module")
def served(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with serving(str(models / "compressed"), environment_with_source(), log) as server:
        below = server.below()
        assert below
        yield server
        assert server.stop(signal.SIGINT) == 130
        assert_gone(below)
    assert "Traceback" not in server.text


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=60, max_retries=0) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_completion_is_what_the_plain_model_generates(
    client: Any, models: Path, expected: dict[str, str], stream: bool
) -> None:
    options = {"model": str(models / "compressed"), "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    answer = client.completions.create(prompt=PROMPT, **options)
    texts = [chunk.choices[0].text for chunk in answer] if stream else [answer.choices[0].text]
    assert len(set(expected["completion"])) > 5
    assert "".join(texts) == expected["completion"]
    assert len(texts) > 3 or not stream
    if not stream:
        assert answer.usage.completion_tokens == TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_what_the_plain_model_generates(
    client: Any, models: Path, expected: dict[str, str], stream: bool
) -> None:
    options = {"model": str(models / "compressed"), "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    answer = client.chat.completions.create(messages=MESSAGES, **options)
    if stream:
        texts = [chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices]
    else:
        texts = [answer.choices[0].message.content]
    assert "".join(texts) == expected["chat"]
    assert len(texts) > 3 or not stream


def test_another_model_is_refused(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="other", prompt=PROMPT, max_tokens=1)
    assert "pinned" in refused.value.response.text


def test_a_port_in_use(served: Served, models: Path) -> None:
    port = served.url.rpartition(":")[2]
    assert "model name: " + str(models / "compressed") in served.text
    run = _serve(str(models / "compressed"), "--port", port)
    assert run.returncode == 2
    assert f"error: port {port} of 127.0.0.1 is in use" in run.stderr


def test_a_damaged_model_is_one_line(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "compressed", tmp_path / "damaged")
    shard = tmp_path / "damaged" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run = _serve(str(tmp_path / "damaged"), "--port", str(free_port()))
    assert run.returncode == 3
    assert "Traceback" not in run.stderr
    told, ended = [line for line in run.stderr.splitlines() if line][-2:]
    assert told.startswith("error: ")
    assert "checksum" in told
    assert "ended with status 2; nothing of the server is left" in ended


def _serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitforbit.cli", "serve", *arguments]
    return subprocess.run(command, env=environment_with_source(), capture_output=True, text=True, timeout=120)


def test_says_when_the_server_was_killed(models: Path, tmp_path: Path) -> None:
    with serving(str(models / "compressed"), environment_with_source(), tmp_path / "log") as server:
        below = server.below()
        below[0].kill()
        assert server.process.wait(20) == 3
        assert_gone(below)
    last = server.text.splitlines()[-1]
    assert last.startswith(f"error: the server (process {below[0].pid}) was killed by SIGKILL (the kernel sends it")
