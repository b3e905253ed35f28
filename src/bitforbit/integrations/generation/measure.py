"""One timed generation, and one variant of a model measured alone in this process."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from bitforbit.errors import PromptTooLongError, UsageError
from bitforbit.integrations.generation import memory, shares
from bitforbit.integrations.generation.directory import ModelDirectory, open_directory
from bitforbit.integrations.generation.load import LoadedModel, Mode, import_model, load, set_threads
from bitforbit.integrations.generation.place import CPU, Place


@dataclass(frozen=True)
class Workload:
    """``batch`` prompts of ``prompt_tokens`` random ids each, and ``new_tokens`` chosen greedily after each prompt."""

    prompt_tokens: int = 32
    new_tokens: int = 64
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.new_tokens < 2:
            raise UsageError(f"tokens: expected 2 or more, since the first counts as latency, got {self.new_tokens}")

    def check(self, directory: ModelDirectory) -> None:
        """Raise PromptTooLongError if the model's context is too short for this."""
        limit, wanted = directory.context_tokens, self.prompt_tokens + self.new_tokens
        if limit is not None and wanted > limit:
            raise PromptTooLongError(
                f"{directory.path}: expected at most {limit} tokens, the context of this model, got "
                f"{self.prompt_tokens} + {self.new_tokens}; ask for fewer"
            )

    def prompts(self, loaded: LoadedModel) -> torch.Tensor:
        """Token ids ``[batch, prompt_tokens]``, the same for every variant."""
        generator = torch.Generator().manual_seed(self.seed)
        prompts = torch.randint(loaded.vocabulary, (self.batch, self.prompt_tokens), generator=generator)
        return prompts.to(loaded.model.device)


@dataclass(frozen=True)
class Timing:
    """Times of one generation. ``tokens_per_second`` counts all sequences' tokens after the first of each."""

    first_token_seconds: float
    seconds: float
    tokens_per_second: float
    tokens: list[list[int]]


@dataclass(frozen=True)
class Alone:
    """What one variant did in a process of its own. Sizes in bytes; None where the system does not tell.

    ``baseline``: resident after the imports. ``running_peak``: the largest resident size from the first prompt on.
    ``peak``: the same, with loading. ``gpu_running_peak`` and ``gpu_peak``: the same of tensors on GPUs. ``digest``:
    SHA-256 of the logits that chose the tokens.
    """

    mode: str
    load_seconds: float
    weight_bytes: int
    baseline: int | None
    resident: int | None
    running_peak: int | None
    peak: int | None
    first: Timing
    warm: Timing
    digest: str
    ran: shares.Shares
    threads: int
    gpu_running_peak: int | None = None
    gpu_peak: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Alone:
        """From what :meth:`to_json` gave."""
        parsed = {
            **value,
            "first": Timing(**value["first"]),
            "warm": Timing(**value["warm"]),
            "ran": shares.Shares(**value["ran"]),
        }
        return cls(**parsed)


class _Clock(BaseStreamer):
    """Notes when each position's tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def greedy(loaded: LoadedModel, new_tokens: int) -> GenerationConfig:
    """Exactly that many tokens, each the most probable one."""
    eos = loaded.model.generation_config.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    return GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=pad or 0
    )


def timed(loaded: LoadedModel, prompts: torch.Tensor, new_tokens: int) -> Timing:
    """Generate greedily from prompts ``[batch, tokens]`` and take the time."""
    clock = _Clock()
    begin = time.perf_counter()
    out = loaded.model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=greedy(loaded, new_tokens),
        streamer=clock,
    )
    seconds = time.perf_counter() - begin
    _, first, *_, last = clock.times  # the prompt itself comes first
    return Timing(
        first_token_seconds=first - begin,
        seconds=seconds,
        tokens_per_second=prompts.shape[0] * (new_tokens - 1) / (last - first),
        tokens=out[:, prompts.shape[1] :].tolist(),
    )


def logits_digest(loaded: LoadedModel, prompts: torch.Tensor, new_tokens: int) -> str:
    """SHA-256 of the bits of the logits that chose each of the new tokens."""
    out = loaded.model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=greedy(loaded, new_tokens),
        output_logits=True,
        return_dict_in_generate=True,
    )
    digest = hashlib.sha256()
    for logits in out.logits:
        digest.update(logits.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure_alone(path: str, mode: Mode, workload: Workload, threads: int | None, place: Place = CPU) -> Alone:
    """Load one variant and generate twice: the first time with memory watched, the second time warm."""
    from pathlib import Path

    count = set_threads(threads)
    directory = open_directory(Path(path))
    directory.warm()
    import_model(directory, mode)
    baseline = memory.resident_bytes()
    loaded = load(directory, mode, threads=count, place=place)
    prompts = workload.prompts(loaded)
    load_peak, resident, gpu_load_peak = memory.peak_bytes(), memory.resident_bytes(), memory.gpu_peak_bytes()
    was_reset = memory.reset_peak()
    memory.reset_gpu_peak()
    first = timed(loaded, prompts, workload.new_tokens)
    running, gpu_running = memory.peak_bytes(), memory.gpu_peak_bytes()
    shares.reset()
    warm = timed(loaded, prompts, workload.new_tokens)
    ran = shares.collect()
    return Alone(
        mode=mode,
        load_seconds=loaded.seconds,
        weight_bytes=loaded.weight_bytes,
        baseline=baseline,
        resident=resident,
        running_peak=running if was_reset else None,
        peak=max(filter(None, (load_peak, running)), default=None),
        first=first,
        warm=warm,
        digest=logits_digest(loaded, prompts, workload.new_tokens),
        ran=ran,
        threads=count,
        gpu_running_peak=gpu_running,
        gpu_peak=max(filter(None, (gpu_load_peak, gpu_running)), default=None),
    )


@dataclass(frozen=True)
class Paired:
    """Medians over rounds in which the variants took turns in one process.

    ``tokens``: the last round's, ``[batch][new_tokens]``. ``logits_difference``: largest difference of the logits after
    the prompts from those of the first variant, as a share of the largest of them.
    """

    rounds: int
    first_token_seconds: float
    tokens_per_second: float
    ran: shares.Shares
    tokens: list[list[int]]
    logits_difference: float


def measure_paired(variants: Sequence[tuple[Mode, LoadedModel]], workload: Workload, rounds: int) -> dict[Mode, Paired]:
    """Let variants take turns, once to warm up and then ``rounds`` times; results by mode.

    Variants ``exact`` and ``fused`` may share one model: its mode is set before each of their turns.
    """
    from bitforbit.nn import set_mode

    timings: dict[Mode, list[Timing]] = {mode: [] for mode, _ in variants}
    ran: dict[Mode, shares.Shares] = {}
    logits: dict[Mode, torch.Tensor] = {}
    prompts = workload.prompts(variants[0][1])
    for n in range(rounds + 1):
        for mode, loaded in variants:
            if mode != "bf16":
                set_mode(loaded.model, mode)
            if not n:
                logits[mode] = _last_logits(loaded, prompts)
            shares.reset()
            timing = timed(loaded, prompts, workload.new_tokens)
            ran[mode] = shares.collect()
            if n:
                timings[mode].append(timing)
    reference = logits[variants[0][0]]
    return {
        mode: Paired(
            rounds=rounds,
            first_token_seconds=statistics.median(t.first_token_seconds for t in done),
            tokens_per_second=statistics.median(t.tokens_per_second for t in done),
            ran=ran[mode],
            tokens=done[-1].tokens,
            logits_difference=float((logits[mode] - reference).abs().max() / reference.abs().max()),
        )
        for mode, done in timings.items()
    }


def _last_logits(loaded: LoadedModel, prompts: torch.Tensor) -> torch.Tensor:
    """Logits after the prompts, ``[batch, vocabulary]`` in FP32."""
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(prompts).logits[:, -1].float().cpu()
    return logits
