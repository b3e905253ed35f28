"""``bitforbit bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitforbit.cli import EXIT_VERIFICATION_FAILED, bench_kv, inference, options, output
from bitforbit.errors import UsageError

if TYPE_CHECKING:
    from bitforbit.integrations.generation.compare import Comparison, Variant

_HEADINGS = ("variant", "tokens/s", "vs BF16", "first token", "load", "memory", "weights", "output")
_LABELS = {"bf16": "BF16", "exact": "exact", "fused": "fused"}


def command(
    source: inference.Model,
    mode: Annotated[str, typer.Option("--mode", metavar="MODES", help="What to compare with BF16.")] = "exact,fused",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=2, metavar="N", help="Tokens to generate.")] = 64,
    kv: Annotated[
        str | None,
        typer.Option("--kv", metavar="BITS", help="Compare key-value caches with the model's own, such as 4,k4v2,2."),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts", metavar="N,...", help="With --kv: prompt lengths; default: 1024,8192,32768 or less."
        ),
    ] = None,
    kv_group: inference.KvGroup = 32,
    kv_residual: inference.KvResidual = 128,
    kv_sink: inference.KvSink = 4,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, metavar="P", help="Prompt length.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="B", help="Sequences at a time.")] = 1,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=1, metavar="R", help="Turns of every variant; default: 3, with --kv 1."),
    ] = None,
    threads: inference.Threads = None,
    device: inference.Device = "auto",
    runtime: inference.Runtime = "auto",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Save a picture of the comparison as PNG.")
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Compare a compressed model with its BF16 self on this machine: same output first, then speed and memory.

    Prompts are random tokens, generation is greedy. Memory and loading are measured in a process for each variant,
    speed with the variants taking turns in one process (if the memory suffices). Exits with 1 if exact is not exact.

    With --kv: quantized key-value caches, which are lossy, against the model's own, on text, in the first of --mode:
    memory, speed and the error of the logits, in one process.
    """
    from bitforbit.integrations import generation

    generation.require("bitforbit bench")
    modes = _modes(mode)
    if kv is not None:
        if plot is not None:
            raise UsageError("--plot: expected a comparison of weights, got one of caches (--kv); leave one out")
        bench_kv.command(
            source,
            inference.Mode(modes[0]),
            kv,
            contexts,
            kv_group,
            kv_residual,
            kv_sink,
            tokens=tokens,
            batch=batch,
            rounds=rounds or 1,
            place=inference.choose_place(device, runtime),
            threads=inference.compute_threads(threads),
            silent=quiet or json,
            json=json,
        )
        return
    if contexts is not None:
        raise UsageError(
            "--contexts: expected --kv beside it, got none; for the comparison of weights: --prompt-tokens"
        )
    if plot is not None:
        from bitforbit.cli.plot import check_plot

        check_plot(plot)
    directory = inference.open_model(source, silent=quiet or json)

    from bitforbit.integrations.generation.compare import compare
    from bitforbit.integrations.generation.measure import Workload

    workload = Workload(prompt_tokens, tokens, batch)
    place = inference.choose_place(device, runtime)
    count = inference.compute_threads(threads)
    with inference.spinner("bench ...", silent=quiet or json) as status:
        say = (lambda _: None) if status is None else status.update
        result = compare(directory, modes, workload, rounds=rounds or 3, threads=count, place=place, say=say)
    if json:
        output.print_json(result.to_json())
    else:
        show(result)
    if plot is not None:
        from bitforbit.cli.bench_plot import save_plot

        save_plot(plot, result)
        if not json:
            output.print_line(f"picture in {plot}")
    if not result.exact:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _modes(text: str) -> list[Any]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in list(inference.Mode)]
    if unknown or not names:
        raise UsageError(f"--mode: expected exact, fused, or both with a comma, got {text!r}")
    return names


def show(result: Comparison) -> None:
    """Print the comparison as a table, and how products ran."""
    work, reference = result.workload, result.variants[0]
    output.print_facts(str(result.directory.path), [("stored", _STORED[result.directory.kind])])
    output.print_line(
        f"  {work.batch} sequence(s), {work.prompt_tokens} prompt tokens, {work.new_tokens} new ones, "
        f"{_where(result)}; "
        + (f"medians of {result.rounds} rounds in turns" if result.paired else "one process after the other")
    )
    output.print_line()
    output.print_table(_HEADINGS, [_cells(v, reference, work.batch * work.new_tokens) for v in result.variants])
    output.print_line()
    for variant in result.variants[1:]:
        output.print_line(f"linears in {variant.mode}: {inference.ran(variant.ran)}")
    base = reference.alone.baseline
    without = "" if base is None else f" (of which Python and torch before loading: {output.size(base)})"
    if result.place.on_gpu:
        output.print_line("memory: the most that tensors took on GPUs while generating; load: from the page cache")
    else:
        output.print_line(f"memory: the largest resident size while generating{without}; load: from the page cache")
    if result.directory.kind != "plain":
        output.print_line("BF16 is made by decoding in memory here, so its loading includes that")
    if any(v.mode == "exact" for v in result.variants):
        same = "exact gives the BF16 model's tokens and logits, bit for bit"
        output.print_line(same if result.exact else "NOT EXACT: the tokens or the logits differ from BF16's")


def _where(result: Comparison) -> str:
    if not result.place.on_gpu:
        return f"{result.threads} thread(s)"
    return "all GPUs" if result.place.device == "gpus" else f"on {result.place.device}"


_STORED = {"bitforbit": "compressed by bitforbit", "dfloat11": "DFloat11", "plain": "plain; compressed while loading"}


def _cells(variant: Variant, reference: Variant, total: int) -> list[str]:
    alone = variant.alone
    peak = alone.gpu_running_peak or alone.running_peak or alone.peak
    return [
        _LABELS[variant.mode],
        f"{variant.tokens_per_second:.2f}",
        f"{variant.tokens_per_second / reference.tokens_per_second:.2f}x",
        output.duration(variant.first_token_seconds),
        output.duration(variant.alone.load_seconds),
        "-" if peak is None else output.size(peak),
        output.size(variant.alone.weight_bytes),
        _output(variant, total),
    ]


def _output(variant: Variant, total: int) -> str:
    if variant.mode == "bf16":
        return "reference"
    if variant.tokens_equal and variant.logits_equal:
        return "same bits"
    same = f"{variant.equal_tokens} of {total} tokens same"
    return same if variant.paired is None else f"{same}, logits within {100 * variant.paired.logits_difference:.2g} %"
