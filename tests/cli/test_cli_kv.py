"""``--kv`` of ``run``, ``chat`` and ``bench``."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_models import one_object
from text_models import PROMPT, TEMPLATE, edit

from bitforbit.cli import main
from bitforbit.demo import model_path

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = str(model_path())
LONG = "import os\n" * 30 + PROMPT


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return one_object(out)


def test_run_says_what_the_cache_takes(capsys: pytest.CaptureFixture[str]) -> None:
    own = answer(capsys, "run", MODEL, "-p", LONG, "-n", "8")
    assert own["kv"]["lossy"] is False
    # 4 layers, keys and values of 2 heads with 64 channels in BF16
    assert own["kv"]["cache"]["bytes_per_token"] == 2 * own["kv"]["cache"]["elements"] / own["kv"]["cache"]["tokens"]
    assert own["kv"]["cache"]["bits_per_element"] == 16
    assert own["kv"]["cache"]["tokens"] == own["prompt_tokens"] + 7
    value = answer(capsys, "run", MODEL, "-p", LONG, "-n", "8", "--kv", "k4v2", "--kv-residual", "32")
    kv = value["kv"]
    assert (kv["name"], kv["lossy"], kv["k_bits"], kv["v_bits"], kv["residual"]) == ("k4v2", True, 4, 2, 32)
    assert kv["cache"]["quantized_layers"] == kv["cache"]["layers"]
    assert kv["cache"]["tokens"] == own["kv"]["cache"]["tokens"]
    same = sum(a == b for a, b in zip(value["token_ids"], own["token_ids"], strict=True))
    assert same >= 4


def test_run_says_that_it_is_lossy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", MODEL, "-p", PROMPT, "-n", "3", "--kv", "4"]) == 0
    err = capsys.readouterr().err
    assert "quantized, 4: LOSSY" in err
    assert "bits per element" in err
    assert main(["run", MODEL, "-p", PROMPT, "-n", "3", "--kv", "2", "-q"]) == 0
    assert capsys.readouterr().err == "the key-value cache is quantized (2): lossy\n"
    assert main(["run", MODEL, "-p", PROMPT, "-n", "3"]) == 0
    assert "the model's own; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv", "5"], "expected 2, 4 or 8, got 5"),
        (["--kv", "k4"], "such as k4v2"),
        (["--kv", "four"], "such as k4v2"),
        (["--kv", "4", "--kv-group", "48"], "group: expected 32, 64 or 128"),
        (["--kv", "4", "--kv-residual", "100"], "multiple of group (32)"),
        (["--kv", "4", "--kv-sink", "-1"], "sink: expected 0 or more"),
    ],
)
def test_wrong_settings(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", MODEL, "-p", PROMPT, "-n", "3", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(model_path(), tmp_path / "chat")
    edit(tmp_path / "chat" / "tokenizer_config.json", chat_template=TEMPLATE)
    return tmp_path / "chat"


def test_chat_reads_only_what_is_new(
    chat_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitforbit.integrations.transformers.kv import KiviLayer

    read: list[int] = []
    update = KiviLayer.update

    def counted(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.index == 0:
            read.append(keys.shape[-2])
        return update(layer, keys, values, *args, **kwargs)

    monkeypatch.setattr(KiviLayer, "update", counted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def one():\ndef two():\n/reset\ndef three():\n"))
    value = answer(capsys, "chat", chat_model, "-n", "6", "--kv", "4", "--kv-residual", "32")
    assert len(value["answers"]) == 3
    assert value["kv"]["lossy"] is True
    first, second, third = [count for count in read if count > 1]
    assert first + second + third < value["prompt_tokens"]
    assert sum(read) == value["prompt_tokens"] + value["new_tokens"] - 3 - (
        value["prompt_tokens"] - first - second - third
    )


def test_chat_is_the_same_without_a_kept_cache(
    chat_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitforbit.integrations.generation.conversation import Conversation

    options = ["chat", chat_model, "-n", "6", "--kv", "8"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("def one():\ndef two():\n"))
    kept = answer(capsys, *options)
    monkeypatch.setattr(Conversation, "_cache_for", lambda self, ids: self.kv.make(self.loaded.model))
    monkeypatch.setattr(sys, "stdin", io.StringIO("def one():\ndef two():\n"))
    assert answer(capsys, *options)["answers"] == kept["answers"]


def test_an_interrupted_answer_leaves_no_cache_behind() -> None:
    from bitforbit.integrations.generation.conversation import Conversation
    from bitforbit.integrations.generation.directory import open_directory
    from bitforbit.integrations.generation.kv import parse
    from bitforbit.integrations.generation.load import load, load_tokenizer
    from bitforbit.integrations.generation.text import Settings

    directory = open_directory(model_path())
    loaded = load(directory, "exact", threads=1)

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    conversation = Conversation(loaded, load_tokenizer(directory), Settings(6), kv=parse("4", 32, 32))
    assert conversation.ask("def one():").stopped == "length"
    assert conversation._cache is not None
    assert conversation.ask("def two():", interrupt).stopped == "interrupted"
    assert conversation._cache is None
    assert conversation.ask("def three():").stopped == "length"


BENCH = ["bench", MODEL, "--kv", "4,2", "-n", "4", "--rounds", "1", "--contexts"]


def test_bench_compares_caches(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, *BENCH, "100,600")
    assert value["prompt"] == "source of Python's standard library"
    caches = value["caches"]
    assert [(c["context"], c["name"]) for c in caches] == [(n, kv) for n in (100, 600) for kv in ("16", "4", "2")]
    for cache in caches:
        assert cache["tokens_per_second"] > 0
        assert cache["cache"]["tokens"] == cache["context"] + 4
        assert cache["peak_bytes"] is None or cache["peak_bytes"] >= 0
    own, four, two = caches[3:]
    assert (own["agreement"], own["kl"], own["kl_max"]) == (1, 0, 0)
    assert own["cache"]["num_bytes"] > four["cache"]["num_bytes"] > two["cache"]["num_bytes"]
    assert 0 < four["kl"] < two["kl"] <= two["kl_max"] < 0.2
    assert 0.5 <= four["agreement"] <= 1


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "40"]) == 0
    out, err = capsys.readouterr()
    for words in ("40 tokens of context", "bits/element", "same token", "KL", "reference"):
        assert words in out
    assert "lossy" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv", "16"], "such as 4,k4v2,2"),
        (["--kv", "4", "--contexts", "many"], "such as 1024,8192"),
        (["--kv", "4", "--contexts", "0"], "1 or more"),
        (["--kv", "4", "--contexts", "100000"], "the context of this model"),
        (["--contexts", "100"], "--kv"),
        (["--kv", "4", "--plot", "x.png"], "--plot"),
    ],
)
def test_bench_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", MODEL, *arguments]) == 2
    assert words in capsys.readouterr().err
