"""Quantized key-value caches against the model's own: memory, speed, and the error, always.

Every cache reads the same prompt and is then given the same tokens one by one: those that the model's own cache
chooses greedily. So the logits of each step can be compared, whatever a cache would have chosen.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from bitforbit.errors import NoTokenizerError, PromptTooLongError, UsageError
from bitforbit.integrations.generation import memory
from bitforbit.integrations.generation.directory import ModelDirectory
from bitforbit.integrations.generation.kv import OWN, KvChoice
from bitforbit.integrations.generation.load import LoadedModel, load_tokenizer
from bitforbit.integrations.transformers.kv import CacheFigures, figures
from bitforbit.integrations.transformers.kv.model import attention, set_attention

CONTEXTS = (1024, 8192, 32768)
_WARMUP = 64


@dataclass(frozen=True)
class KvResult:
    """One cache at one context.

    ``peak_bytes``: the most that memory grew by from before the prompt on, cache and scratch together (of tensors on
    GPUs, or of the resident size). ``agreement``: share of steps whose most probable token is that of the model's own
    cache. ``kl``: mean over steps of KL(own || this) in nats, ``kl_max`` the largest.
    """

    kv: KvChoice
    context: int
    cache: CacheFigures
    peak_bytes: int | None
    prompt_seconds: float
    tokens_per_second: float
    agreement: float
    kl: float
    kl_max: float

    def to_json(self) -> dict[str, Any]:
        """Every figure."""
        names = ("context", "peak_bytes", "prompt_seconds", "tokens_per_second", "agreement", "kl", "kl_max")
        return {**self.kv.to_json(), **{name: getattr(self, name) for name in names}, "cache": self.cache.to_json()}


@dataclass(frozen=True)
class KvComparison:
    """Result of :func:`compare_caches`: for each context the model's own cache first. ``prompt`` says what was read."""

    directory: ModelDirectory
    mode: str
    prompt: str
    batch: int
    new_tokens: int
    rounds: int
    device: str
    threads: int
    results: list[KvResult]

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        names = ("mode", "prompt", "batch", "new_tokens", "rounds", "device", "threads")
        return {
            "model": str(self.directory.path),
            "stored_as": self.directory.kind,
            **{name: getattr(self, name) for name in names},
            "caches": [result.to_json() for result in self.results],
        }


@dataclass(frozen=True)
class _Run:
    cache: CacheFigures
    peak_bytes: int | None
    prompt_seconds: float
    seconds: float
    tokens: torch.Tensor
    logits: torch.Tensor


def compare_caches(
    loaded: LoadedModel,
    choices: Sequence[KvChoice],
    contexts: Sequence[int] | None = None,
    *,
    new_tokens: int = 64,
    batch: int = 1,
    rounds: int = 1,
    device: str = "cpu",
    threads: int = 1,
    say: Callable[[str], object] = lambda _: None,
) -> KvComparison:
    """Measure the model's own cache and ``choices``, in turns, at every context.

    By default those contexts of 1024, 8192 and 32768 tokens that the model has. Speeds are the best round's. Raises
    UsageError, PromptTooLongError, KvCacheError or KvSpecError.
    """
    wanted = [OWN, *(choice for choice in dict.fromkeys(choices) if choice.lossy)]
    if new_tokens < 2:
        raise UsageError(f"tokens: expected 2 or more, got {new_tokens}")
    lengths = _contexts(loaded.directory, contexts, new_tokens)
    text, prompt = _prompt(loaded, max(lengths), batch)
    own_attention = attention(loaded.model)
    for choice in wanted:
        choice.make(loaded.model)  # what cannot be measured is found before anything is
        set_attention(loaded.model, own_attention)
        _run(loaded, choice, prompt[:, :_WARMUP], 2, None)  # what happens only once is not measured
    results: list[KvResult] = []
    for length in lengths:
        runs: dict[KvChoice, list[_Run]] = {choice: [] for choice in wanted}
        for n in range(rounds):
            for choice in wanted:
                set_attention(loaded.model, own_attention)
                say(f"{length} tokens, cache {choice.name}, round {n + 1} of {rounds}")
                forced = runs[OWN][0].tokens if runs[OWN] else None
                runs[choice].append(_run(loaded, choice, prompt[:, :length], new_tokens, forced))
        results += [_result(choice, length, runs[choice], runs[OWN][0], new_tokens) for choice in wanted]
    set_attention(loaded.model, own_attention)
    return KvComparison(loaded.directory, loaded.mode, text, batch, new_tokens, rounds, device, threads, results)


def _contexts(directory: ModelDirectory, contexts: Sequence[int] | None, new_tokens: int) -> list[int]:
    limit = directory.context_tokens
    if contexts is None:
        chosen = [n for n in CONTEXTS if limit is None or n + new_tokens <= limit]
        return chosen or [max(1, (limit or CONTEXTS[0]) - new_tokens)]
    for n in contexts:
        if n < 1:
            raise UsageError(f"--contexts: expected 1 or more tokens, got {n}")
        if limit is not None and n + new_tokens > limit:
            raise PromptTooLongError(
                f"{directory.path}: expected at most {limit} tokens, the context of this model, got {n} + {new_tokens}"
            )
    return sorted(set(contexts))


def _prompt(loaded: LoadedModel, length: int, batch: int) -> tuple[str, torch.Tensor]:
    """What is read, and its token ids ``[batch, length]``: real text, where there is a tokenizer for it."""
    try:
        tokenizer = load_tokenizer(loaded.directory)
    except NoTokenizerError:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(loaded.vocabulary, (batch, length), generator=generator)
        return "random tokens", ids.to(loaded.model.device)
    rows, row = [], []
    for path in _library():
        row += tokenizer(path.read_text(encoding="utf-8", errors="replace"))["input_ids"]
        if len(row) >= length:
            rows.append(row[:length])
            row = []
        if len(rows) == batch:
            break
    else:
        raise UsageError(f"expected at most what Python's standard library has, got {batch} x {length} tokens")
    return "source of Python's standard library", torch.tensor(rows).to(loaded.model.device)


def _library() -> list[Path]:
    """Sources of the standard library, in an order that does not depend on the machine."""
    return sorted(Path(os.__file__).parent.glob("[a-z]*.py"))


def _run(loaded: LoadedModel, choice: KvChoice, prompt: torch.Tensor, steps: int, forced: torch.Tensor | None) -> _Run:
    """Read a prompt ``[B, n]``, then ``steps`` tokens one by one: ``forced`` [B, steps], else the most probable."""
    model = loaded.model
    own = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache = own if choice.spec is None else choice.make(model)
    # Where they are computed, and there before memory is measured: a step waits for no copy.
    shape = (steps, prompt.shape[0], loaded.vocabulary)
    logits = torch.zeros(shape, dtype=model.dtype, device=prompt.device)
    gc.collect()
    memory.give_back_freed()
    on_gpu = prompt.is_cuda
    before = _on_gpus() if on_gpu else memory.resident_bytes()
    was_reset = memory.reset_peak()
    memory.reset_gpu_peak()
    tokens = []
    with torch.no_grad():
        begin = _now(on_gpu)
        last = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        read = _now(on_gpu)
        for n in range(steps):
            logits[n] = last
            tokens.append(last.argmax(-1) if forced is None else forced[:, n].to(last.device))
            last = model(tokens[-1][:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        end = _now(on_gpu)
    peak = memory.gpu_peak_bytes() if on_gpu else memory.peak_bytes()
    known = peak is not None and before is not None and (on_gpu or was_reset)
    return _Run(
        cache=figures(cache),
        peak_bytes=peak - before if known and peak is not None and before is not None else None,
        prompt_seconds=read - begin,
        seconds=end - read,
        tokens=torch.stack(tokens, 1),
        logits=logits.transpose(0, 1).float().cpu(),
    )


def _on_gpus() -> int:
    return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _result(choice: KvChoice, context: int, runs: list[_Run], own: _Run, steps: int) -> KvResult:
    first = runs[0]
    expected, got = own.logits.log_softmax(-1), first.logits.log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1)
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return KvResult(
        kv=choice,
        context=context,
        cache=first.cache,
        peak_bytes=max(peaks) if len(peaks) == len(runs) else None,
        prompt_seconds=min(run.prompt_seconds for run in runs),
        tokens_per_second=first.tokens.shape[0] * steps / min(run.seconds for run in runs),
        agreement=float((own.logits.argmax(-1) == first.logits.argmax(-1)).float().mean()),
        kl=float(kl.mean()),
        kl_max=float(kl.max()),
    )
