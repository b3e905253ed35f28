"""The part of the demonstration that writes text: BF16, exact and fused side by side."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitforbit.archive import decompress
from bitforbit.integrations.generation import shares
from bitforbit.integrations.generation.directory import open_directory
from bitforbit.integrations.generation.load import LoadedModel, Mode, load, load_tokenizer
from bitforbit.integrations.generation.text import Settings, encode_prompt, generate

PROMPTS = (
    'class Stack:\n    """A stack',
    "def read_json(path):\n",
    "def main():\n    parser = argparse.ArgumentParser(",
)
SETTINGS = Settings(max_new_tokens=64, temperature=0.5, seed=3)
"""Sampled: which token a seed picks depends on every bit of the logits, so equal tokens say more than greedy ones."""


@dataclass(frozen=True)
class Written:
    """What one variant wrote to all prompts; ``equal_tokens`` of ``tokens`` are the BF16 model's at that place."""

    mode: Mode
    texts: list[str]
    tokens: int
    equal_tokens: int
    same: bool
    weight_bytes: int
    ran: dict[str, Any]


@dataclass(frozen=True)
class Showcase:
    """Result of :func:`write_text`. ``exact``: mode exact wrote the BF16 model's tokens, one for one."""

    prompts: list[str]
    settings: Settings
    variants: list[Written]
    exact: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


def write_text(compressed: Path, threads: int | None = None) -> Showcase:
    """Generate from the model as it was before compression, by stock transformers, and from the compressed one.

    Raises ModelLoadError, NoTokenizerError or a FormatError.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bitforbit-demo-") as temporary:
        original = Path(temporary) / "original"
        decompress(compressed, original, threads=threads)
        reference = load(open_directory(original), "bf16", threads=threads)
        ids, texts, _ = _write(reference)
    total = sum(map(len, ids))
    done = [Written("bf16", texts, total, total, True, reference.weight_bytes, {})]
    modes: tuple[Mode, ...] = ("exact", "fused")
    for mode in modes:
        loaded = load(open_directory(compressed), mode, threads=threads)
        got, texts, ran = _write(loaded)
        equal = sum(a == b for mine, other in zip(got, ids, strict=True) for a, b in zip(mine, other, strict=False))
        done.append(Written(mode, texts, total, equal, got == ids, loaded.weight_bytes, ran))
    exact = all(variant.same for variant in done if variant.mode == "exact")
    return Showcase(list(PROMPTS), SETTINGS, done, exact, time.perf_counter() - begin)


def _write(loaded: LoadedModel) -> tuple[list[list[int]], list[str], dict[str, Any]]:
    tokenizer = load_tokenizer(loaded.directory)
    shares.reset()
    results = [generate(loaded, tokenizer, encode_prompt(tokenizer, prompt), SETTINGS) for prompt in PROMPTS]
    ran = shares.collect().to_json()
    return [result.token_ids for result in results], [result.text for result in results], ran
