"""``bitforbit demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitforbit.cli import EXIT_VERIFICATION_FAILED, inference, options, output
from bitforbit.cli.progress import progress_bar

if TYPE_CHECKING:
    from bitforbit.demo import DemoReport
    from bitforbit.integrations.generation.showcase import Showcase


def command(
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Leave the model and its compressed forms in this directory."),
    ] = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Compress and restore the small Llama that comes with bitforbit, with both formats, and compare every byte.

    Then, if torch and transformers are installed, let it write text from compressed weights and compare every token.
    """
    from bitforbit import demo
    from bitforbit.integrations import generation

    with progress_bar(silent=quiet or json) as progress:
        report = demo.run(keep=keep, threads=options.thread_count(threads), progress=progress)
    if not json:
        show(report)
    written = None if generation.missing() else _write_text(report.model, threads, silent=quiet or json)
    if json:
        output.print_json({**report.to_json(), "generation": None if written is None else written.to_json()})
    else:
        output.print_line()
        show_text(written)
    if not (report.exact and (written is None or written.exact)):
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _write_text(model: str, threads: int | None, *, silent: bool) -> Showcase:
    with inference.spinner("Generating text ...", silent=silent):
        from bitforbit.integrations.generation.showcase import write_text

        # The model is so small that more threads do not help by themselves, and they hurt on a busy machine.
        return write_text(Path(model), inference.compute_threads(threads or 1))


def show_text(written: Showcase | None) -> None:
    """Print what the model wrote, and how the variants compare; without torch, how to get that."""
    if written is None:
        output.print_line("To see the model write text from its compressed weights too: pip install torch transformers")
        return
    reference, *variants = written.variants
    output.print_facts("It writes from its compressed weights, such as", [])
    for line in (written.prompts[0] + reference.texts[0]).splitlines():
        output.print_line(f"  | {line}".rstrip())
    output.print_line()
    rows = [
        [
            _VARIANTS[v.mode],
            output.size(v.weight_bytes),
            output.percent(v.weight_bytes, reference.weight_bytes),
            "-" if v is reference else f"{v.equal_tokens} of {v.tokens}",
        ]
        for v in (reference, *variants)
    ]
    output.print_table(["variant", "weights in memory", "of BF16", "tokens as BF16"], rows)
    output.print_line()
    prompts, settings = len(written.prompts), written.settings
    verdict = "mode exact wrote the BF16 model's tokens, one for one" if written.exact else "NOT EXACT"
    output.print_line(
        f"{prompts} prompts, sampled at temperature {settings.temperature} with the same seed: {verdict}; "
        f"{output.duration(written.seconds)}"
    )


_VARIANTS = {"bf16": "BF16 (transformers)", "exact": "exact", "fused": "fused (its own order of sums)"}


def show(report: DemoReport) -> None:
    """Print the report: the model, then a line for each format."""
    output.print_facts("A small Llama, trained from scratch; it comes with this package", _facts(report.facts))
    output.print_line()
    output.print_line(
        f"Restored from {output.size(report.shipped_bytes)}: {report.files} files, "
        f"{output.size(report.original_bytes)}; the SHA-256 of each is the recorded one."
    )
    output.print_line()
    weights = report.original_weight_bytes
    width = _bits(report)
    rows = [["original", output.size(weights), "100.0 %", output.number(width), "-", "-", "-"]]
    rows += [
        [
            result.format,
            output.size(result.weight_bytes),
            f"{result.percent_of_original:.1f} %",
            output.number(result.bits_per_weight),
            f"{result.compress_gb_per_second:.2f} GB/s",
            f"{result.decompress_gb_per_second:.2f} GB/s",
            _came_back(result),
        ]
        for result in report.formats
    ]
    headings = ("format", "weights", "of original", "bits/weight", "compress", "decompress", "came back bit for bit")
    output.print_table(headings, rows)
    output.print_line()
    output.print_line(
        "compress and decompress: directory to directory, with all checksums and files synced to disk. In memory, "
        f"with {report.memory.threads} thread(s), planes encodes {report.memory.encode_gb_per_second:.2f} GB/s and "
        f"decodes {report.memory.decode_gb_per_second:.2f} GB/s."
    )
    if report.kept is not None:
        output.print_line(f"kept in {report.kept}")
    output.print_line(f"{'Everything came back' if report.exact else 'NOT EXACT'}; {output.duration(report.seconds)}")


def _bits(report: DemoReport) -> float | None:
    """Bits per weight of the original, from the figures of a format."""
    for result in report.formats:
        return result.bits_per_weight * 100 / result.percent_of_original
    return None


def _came_back(result: Any) -> str:
    tensors = f"{result.equal_tensors} of {result.tensors} tensors"
    return tensors if result.format == "df11" else f"{result.equal_files} of {result.files} files, {tensors}"


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What the training report says, in words; members that it lacks are left out."""
    held_out = facts.get("held_out", {})
    lines = []
    if "parameters" in facts:
        lines.append(("parameters", f"{facts['parameters']:,} in {facts.get('weights_dtype', 'an unknown dtype')}"))
    if "training_bytes" in facts:
        files = f" ({facts['training_files']:,} files)" if "training_files" in facts else ""
        python = facts.get("versions", {}).get("python", "")
        lines.append(
            ("trained on", f"{output.size(facts['training_bytes'])} of the Python {python} standard library{files}")
        )
    if "tokens_trained" in facts:
        lines.append(("training", f"{facts['tokens_trained']:,} tokens in {output.duration(facts.get('seconds', 0))}"))
    if "perplexity_per_token" in held_out:
        modules = len(facts.get("held_out_modules", ()))
        bits = f"; {held_out['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in held_out else ""
        lines.append(
            (
                "held out",
                f"perplexity {held_out['perplexity_per_token']:.2f} per token on {modules} modules not seen{bits}",
            )
        )
    return lines
