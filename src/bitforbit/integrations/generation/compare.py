"""The BF16 model against its compressed forms: each alone for memory and loading, then in turns for speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bitforbit.integrations.generation import memory
from bitforbit.integrations.generation.directory import ModelDirectory
from bitforbit.integrations.generation.load import LoadedModel, Mode, load, set_threads
from bitforbit.integrations.generation.measure import Alone, Paired, Workload, measure_paired
from bitforbit.integrations.generation.place import CPU, Place
from bitforbit.integrations.generation.shares import Shares
from bitforbit.integrations.generation.worker import measure_in_process

_SPARE = 0.85
"""Of the machine's available memory, this much may be taken by the models that are paired."""


@dataclass(frozen=True)
class Variant:
    """One row of the comparison. ``tokens_equal`` and ``logits_equal`` are against BF16."""

    mode: Mode
    alone: Alone
    paired: Paired | None
    tokens_equal: bool
    equal_tokens: int
    logits_equal: bool

    @property
    def tokens_per_second(self) -> float:
        """Paired if there was memory for that, else of the process alone."""
        return self.paired.tokens_per_second if self.paired else self.alone.warm.tokens_per_second

    @property
    def first_token_seconds(self) -> float:
        """Paired if there was memory for that, else of the process alone."""
        return self.paired.first_token_seconds if self.paired else self.alone.warm.first_token_seconds

    @property
    def ran(self) -> Shares:
        """How the linears ran in the generation that was timed."""
        return self.paired.ran if self.paired else self.alone.ran

    def to_json(self) -> dict[str, Any]:
        """All figures, without the tokens themselves."""
        alone = {
            name: value
            for name, value in self.alone.to_json().items()
            if name not in ("ran", "first", "warm", "threads")
        }
        return {
            "mode": self.mode,
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
            "tokens_equal": self.tokens_equal,
            "equal_tokens": self.equal_tokens,
            "logits_equal": self.logits_equal,
            "logits_difference": self.paired.logits_difference if self.paired else None,
            **alone,
            "first_run_first_token_seconds": self.alone.first.first_token_seconds,
            "ran": self.ran.to_json(),
        }


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`; the first variant is BF16. ``paired``: whether speeds were taken in turns."""

    directory: ModelDirectory
    workload: Workload
    threads: int
    rounds: int
    paired: bool
    variants: list[Variant]
    place: Place = CPU

    @property
    def exact(self) -> bool:
        """Whether mode exact, where it was asked for, gave the BF16 model's tokens and logits."""
        return all(v.tokens_equal and v.logits_equal for v in self.variants if v.mode == "exact")

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            "model": str(self.directory.path),
            "stored_as": self.directory.kind,
            "directory_bytes": self.directory.num_bytes,
            "workload": asdict(self.workload),
            "threads": self.threads,
            "device": self.place.device,
            "runtime": self.place.runtime,
            "rounds": self.rounds,
            "paired": self.paired,
            "exact": self.exact,
            "variants": [variant.to_json() for variant in self.variants],
        }


def compare(
    directory: ModelDirectory,
    modes: Sequence[Mode],
    workload: Workload,
    *,
    rounds: int = 3,
    threads: int | None = None,
    bf16: ModelDirectory | None = None,
    place: Place = CPU,
    say: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Measure BF16 and the given modes, correctness first.

    ``bf16`` is where the BF16 model is loaded from; by default it is ``directory``, decoded if it is compressed. All
    variants run at ``place``.
    ``say`` hears what is being done. Raises WorkerError, ModelLoadError, PromptTooLongError, a FormatError.
    """
    workload.check(directory)
    plain = bf16 or directory
    wanted: list[Mode] = ["bf16", *(mode for mode in dict.fromkeys(modes) if mode != "bf16")]
    count = set_threads(threads)
    alone: dict[Mode, Alone] = {}
    for mode in wanted:
        say(f"{mode}: loading and generating in a process of its own")
        alone[mode] = measure_in_process((plain if mode == "bf16" else directory).path, mode, workload, count, place)
    variants = [_checked(mode, alone[mode], alone["bf16"]) for mode in wanted]
    paired = len(variants) > 1 and rounds > 0 and _fit_together(alone) and _fit_on_gpus(alone, place)
    if paired:
        say("loading all variants into one process")
        models: dict[str, LoadedModel] = {"bf16": load(plain, "bf16", threads=count, place=place)}
        models["compressed"] = load(directory, wanted[1], threads=count, place=place)
        pairs = [(mode, models["bf16" if mode == "bf16" else "compressed"]) for mode in wanted]
        say(f"{', '.join(wanted)}: taking turns, {rounds} rounds")
        results = measure_paired(pairs, workload, rounds)
        variants = [
            replace(
                variant,
                paired=results[variant.mode],
                tokens_equal=variant.tokens_equal and results[variant.mode].tokens == results["bf16"].tokens,
            )
            for variant in variants
        ]
    return Comparison(directory, workload, count, rounds if paired else 0, paired, variants, place)


def _checked(mode: Mode, alone: Alone, reference: Alone) -> Variant:
    pairs = zip(alone.first.tokens, reference.first.tokens, strict=True)
    equal = sum(a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))
    return Variant(
        mode=mode,
        alone=alone,
        paired=None,
        tokens_equal=alone.first.tokens == reference.first.tokens == alone.warm.tokens,
        equal_tokens=equal,
        logits_equal=alone.digest == reference.digest,
    )


def _fit_together(alone: dict[Mode, Alone]) -> bool:
    """Whether the BF16 model and one compressed one fit into memory beside each other."""
    available = memory.available_bytes()
    peaks = [result.peak for result in alone.values()]
    known = [peak for peak in peaks if peak is not None]
    if available is None or len(known) < len(peaks):
        return False
    compressed = max((result.peak or 0 for mode, result in alone.items() if mode != "bf16"), default=0)
    return (alone["bf16"].peak or 0) + compressed < _SPARE * available


def _fit_on_gpus(alone: dict[Mode, Alone], place: Place) -> bool:
    if not place.on_gpu:
        return True
    compressed = max((result.gpu_peak or 0 for mode, result in alone.items() if mode != "bf16"), default=0)
    return (alone["bf16"].gpu_peak or 0) + compressed < _SPARE * memory.gpu_available_bytes()
