"""What the commands that generate text share: options, loading with a word of what happens, the closing figures."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitforbit.cli import output
from bitforbit.cli.source import resolve

if TYPE_CHECKING:
    from bitforbit.integrations.generation.directory import ModelDirectory
    from bitforbit.integrations.generation.kv import KvChoice
    from bitforbit.integrations.generation.load import LoadedModel
    from bitforbit.integrations.generation.place import Place
    from bitforbit.integrations.generation.shares import Shares
    from bitforbit.integrations.generation.text import Generation

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Characters that a terminal may obey, but for tabs and ends of lines."""


class Mode(StrEnum):
    """Modes of computing with compressed weights."""

    exact = "exact"
    fused = "fused"


Model = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Model directory (of bitforbit, plain or DFloat11), or Hub model (org/name or org/name@commit).",
    ),
]
ModeOption = Annotated[
    Mode,
    typer.Option("--mode", help="exact: the bits of the BF16 model. fused: products in an order of their own, faster."),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="Write at most this many tokens.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, metavar="T", help="0: the most probable token; above: sampled.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, metavar="S", help="Seed of the sampling.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=1024, help="Number of threads; default: BITFORBIT_THREADS, else torch's choice."
    ),
]


Device = Annotated[
    str,
    typer.Option("--device", metavar="D", help="auto (a GPU if it can be used), cpu, cuda or cuda:N."),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="R",
        help="Layout of the weights in memory: auto, planes (the files'), tiles (GPU), df11 (GPU, DFloat11 models).",
    ),
]
Kv = Annotated[
    str,
    typer.Option(
        "--kv",
        metavar="BITS",
        help="Key-value cache: 16 (the model's own), or quantized, which is lossy: 8, 4, 2, k8v4, k4v2, k...v...",
    ),
]
KvGroup = Annotated[
    int, typer.Option("--kv-group", metavar="G", help="Numbers of a quantized cache that share a scale: 32, 64, 128.")
]
KvResidual = Annotated[
    int, typer.Option("--kv-residual", metavar="R", help="Last tokens that stay exact, a multiple of G.")
]
KvSink = Annotated[int, typer.Option("--kv-sink", metavar="S", help="First tokens that stay exact.")]


def choose_kv(kv: str, group: int, residual: int, sink: int, *, note: bool) -> KvChoice:
    """The cache to use. With ``note``, standard error says that it is lossy. Raises UsageError or KvSpecError."""
    from bitforbit.integrations.generation.kv import parse

    choice = parse(kv, group, residual, sink)
    if note and choice.lossy:
        print(f"the key-value cache is quantized ({choice.name}): lossy", file=sys.stderr)
    return choice


def choose_place(device: str, runtime: str) -> Place:
    """Where the model is to run. Raises UsageError, or GpuUnavailableError, which says why."""
    from bitforbit.integrations.generation.place import choose

    return choose(device, runtime)


def compute_threads(threads: int | None) -> int:
    """Set torch's number of threads: the option, else ``BITFORBIT_THREADS``, else what torch has chosen."""
    import os

    from bitforbit.cpu import default_threads
    from bitforbit.integrations.generation.load import set_threads

    if threads is None and os.environ.get("BITFORBIT_THREADS"):
        threads = default_threads()
    return set_threads(threads)


def open_model(source: str, *, silent: bool) -> ModelDirectory:
    """The directory of a source, fetched from the Hub if need be. Raises a UsageError or MissingDependencyError."""
    from bitforbit.integrations.generation.directory import open_directory

    return open_directory(resolve(source, silent=silent))


def load_model(directory: ModelDirectory, mode: Mode, threads: int, place: Place, *, silent: bool) -> LoadedModel:
    """Load, with a spinner on a terminal meanwhile."""
    from bitforbit.integrations.generation.load import load

    doing = {"plain": "Loading and compressing", "dfloat11": "Loading and converting"}.get(directory.kind, "Loading")
    with spinner(f"{doing} {directory.path} ...", silent=silent):
        return load(directory, mode.value, threads=threads, place=place)


@contextmanager
def spinner(text: str, *, silent: bool) -> Iterator[Any]:
    """A line with a spinner on standard error for the ``with`` block; nothing if ``silent`` or no terminal."""
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(text)) as status:
        yield status


def write(text: str) -> None:
    """Text as it comes, to standard output; on a terminal without what it would obey."""
    sys.stdout.write(_CONTROLS.sub(lambda c: repr(c[0])[1:-1], text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def figures(
    loaded: LoadedModel,
    generations: Iterable[Generation],
    shares: Shares,
    place: Place,
    threads: int,
    kv: KvChoice,
) -> dict[str, Any]:
    """What both commands report with ``--json``. Rates are over all generations, None where not measurable.

    The cache is the last generation's.
    """
    from bitforbit.integrations.generation import memory

    done = list(generations)
    cache = next((g.cache.to_json() for g in reversed(done) if g.cache is not None), None)
    rated = [g for g in done if g.tokens_per_second]
    later = sum(len(g.token_ids) - 1 for g in rated)
    seconds = sum((len(g.token_ids) - 1) / g.tokens_per_second for g in rated if g.tokens_per_second)
    return {
        "model": str(loaded.directory.path),
        "stored_as": loaded.directory.kind,
        "mode": loaded.mode,
        "device": place.device,
        "runtime": place.runtime,
        "threads": threads,
        "prompt_tokens": sum(g.prompt_tokens for g in done),
        "new_tokens": sum(len(g.token_ids) for g in done),
        "load_seconds": loaded.seconds,
        "first_token_seconds": done[0].first_token_seconds if done else None,
        "tokens_per_second": later / seconds if seconds else None,
        "seconds": sum(g.seconds for g in done),
        "weight_bytes": loaded.weight_bytes,
        "peak_bytes": memory.peak_bytes(),
        "gpu_peak_bytes": memory.gpu_peak_bytes(),
        "kv": {**kv.to_json(), "cache": cache},
        "ran": shares.to_json(),
    }


def show_figures(values: dict[str, Any], shares: Shares) -> None:
    """The figures on standard error, so that standard output holds the text alone."""
    rate, first, on_gpu = values["tokens_per_second"], values["first_token_seconds"], values["gpu_peak_bytes"]
    peaks = "" if on_gpu is None else f", tensors on GPUs at most {output.size(on_gpu)}"
    sizes = f"weights {output.size(values['weight_bytes'])}, process at most {_size(values['peak_bytes'])}"
    facts = [
        ("tokens", f"{values['new_tokens']} after a prompt of {values['prompt_tokens']}"),
        ("speed", "-" if rate is None else f"{rate:.3g} tokens/s with {values['threads']} thread(s)"),
        ("first token", "-" if first is None else f"after {output.duration(first)}"),
        ("loading", output.duration(values["load_seconds"])),
        ("memory", sizes + peaks),
        ("cache", _cache(values["kv"])),
        ("linears", ran(shares)),
        ("mode", _MODES[values["mode"]]),
    ]
    output.print_facts("", facts, to_errors=True)


_MODES = {
    "exact": "exact: the bits of the BF16 model",
    "fused": "fused: the weights are exact, sums are in an order of our own",
}


def ran(shares: Shares) -> str:
    """Such as ``"92.0 % fused in torch's order, 8.0 % decoded (weights: 97.1 %, 2.9 %)"``."""
    names = {"fused_exact": "fused in torch's own order", "fused": "fused", "decoded": "decoded first"}
    linears = {way: count for way, count in shares.linears.items() if count}
    if not linears:
        return "none with compressed weights"
    total, total_bytes = sum(shares.linears.values()), sum(shares.weight_bytes.values())
    nbytes = {way: output.percent(shares.weight_bytes[way], total_bytes) for way in linears}
    return ", ".join(
        f"{output.percent(count, total)} {names[way]} ({nbytes[way]} of weights)" for way, count in linears.items()
    )


def _cache(kv: dict[str, Any]) -> str:
    words = f"quantized, {kv['name']}: LOSSY" if kv["lossy"] else "the model's own"
    cache = kv["cache"]
    if not cache or not cache["bytes_per_token"]:
        return words
    return (
        f"{words}; {output.size(cache['num_bytes'])} for {cache['tokens']} tokens, "
        f"{output.size(round(cache['bytes_per_token']))} per token, {cache['bits_per_element']:.2f} bits per element"
    )


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else output.size(nbytes)
