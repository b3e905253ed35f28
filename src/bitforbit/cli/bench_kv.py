"""The part of ``bitforbit bench`` that compares key-value caches."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bitforbit.cli import inference, output
from bitforbit.errors import UsageError

if TYPE_CHECKING:
    from bitforbit.integrations.generation.kv import KvChoice
    from bitforbit.integrations.generation.kv_compare import KvComparison, KvResult
    from bitforbit.integrations.generation.place import Place

_HEADINGS = (
    "cache", "memory", "vs 16", "per token", "bits/element", "peak", "prompt", "tokens/s", "same token", "KL",
)  # fmt: skip


def command(
    source: str,
    mode: inference.Mode,
    names: str,
    contexts: str | None,
    group: int,
    residual: int,
    sink: int,
    *,
    tokens: int,
    batch: int,
    rounds: int,
    place: Place,
    threads: int,
    silent: bool,
    json: bool,
) -> None:
    """Load the model once, compare, print."""
    wanted, lengths = choices(names, group, residual, sink), _lengths(contexts)
    directory = inference.open_model(source, silent=silent)
    loaded = inference.load_model(directory, mode, threads, place, silent=silent)

    from bitforbit.integrations.generation.kv_compare import compare_caches

    with inference.spinner("bench ...", silent=silent) as status:
        result = compare_caches(
            loaded,
            wanted,
            lengths,
            new_tokens=tokens,
            batch=batch,
            rounds=rounds,
            device=place.device,
            threads=threads,
            say=(lambda _: None) if status is None else status.update,
        )
    if json:
        output.print_json(result.to_json())
        return
    show(result)
    print("quantized key-value caches are lossy: their error is in the last two columns", file=sys.stderr)


def choices(names: str, group: int, residual: int, sink: int) -> list[KvChoice]:
    """The caches of ``--kv 4,k4v2,2``. Raises UsageError or KvSpecError."""
    from bitforbit.integrations.generation.kv import parse

    found = [parse(name, group, residual, sink) for name in names.split(",") if name.strip()]
    if not any(choice.lossy for choice in found):
        raise UsageError(f"--kv: expected caches to compare with the model's own, such as 4,k4v2,2, got {names!r}")
    return found


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise UsageError(f"--contexts: expected numbers of tokens such as 1024,8192, got {text!r}")
    return found


def show(result: KvComparison) -> None:
    """Print a table for each context."""
    output.print_facts(str(result.directory.path), [("prompt", result.prompt)])
    output.print_line(
        f"  {result.batch} sequence(s), then {result.new_tokens} tokens one by one, those that the model's own cache "
        f"chooses; mode {result.mode}, "
        + (f"{result.threads} thread(s)" if result.device == "cpu" else f"on {result.device}")
        + (f", best of {result.rounds} rounds" if result.rounds > 1 else "")
    )
    by_context: dict[int, list[KvResult]] = {}
    for one in result.results:
        by_context.setdefault(one.context, []).append(one)
    for context, group in by_context.items():
        output.print_line()
        output.print_line(f"{context} tokens of context")
        output.print_table(_HEADINGS, [_cells(one, group[0]) for one in group])
    output.print_line()
    output.print_line("memory: the cache's tensors at the end, exact window and scales included; peak: how much memory")
    output.print_line(
        "grew while reading and writing; KL: nats per token, of the logits from those of the model's own cache"
    )


def _cells(one: KvResult, own: KvResult) -> list[str]:
    cache: Any = one.cache
    return [
        one.kv.name,
        output.size(cache.num_bytes),
        f"{own.cache.num_bytes / cache.num_bytes:.2f}x" if cache.num_bytes else "-",
        output.size(round(cache.bytes_per_token or 0)),
        f"{cache.bits_per_element or 0:.2f}",
        "-" if one.peak_bytes is None else output.size(one.peak_bytes),
        output.duration(one.prompt_seconds),
        f"{one.tokens_per_second:.2f}",
        "reference" if not one.kv.lossy else f"{100 * one.agreement:.1f} %",
        "" if not one.kv.lossy else f"{one.kl:.2g}",
    ]
