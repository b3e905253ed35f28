"""``bitforbit plan``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitforbit.cli import options, output
from bitforbit.errors import PlanError

if TYPE_CHECKING:
    from bitforbit.planner import KvSetting, Plan, Request, Row, Shape, Split

_HEADINGS = (
    "mode",
    "KV",
    "weights",
    "decoding",
    "KV cache",
    "other",
    "total",
    "fits",
    "longest",
    "tokens/s, est.",
)
_KV = "16,8,4,k4v2,2"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model directory, compressed or not; a config.json; or Hub model.")
    ] = "",
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="H200, 4090, 80GB, CPU:16GB, ...; list: all.")
    ] = "H100",
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", min=1, help="GPUs, the layers over them.")] = None,
    tensor: Annotated[int | None, typer.Option("--tp", metavar="N", min=1, help="GPUs sharing every matrix.")] = None,
    pipeline: Annotated[
        int | None, typer.Option("--pp", metavar="N", min=1, help="Groups of GPUs that share the layers.")
    ] = None,
    kv: Annotated[str, typer.Option("--kv", metavar="LIST", help="Bits of keys and values: 16, 8, 4, k4v2, 2.")] = _KV,
    kv_group: Annotated[int, typer.Option("--kv-group", metavar="N", help="Numbers that share a scale.")] = 32,
    kv_residual: Annotated[int, typer.Option("--kv-residual", metavar="N", help="Exact tokens at the end.")] = 128,
    kv_sink: Annotated[int, typer.Option("--kv-sink", metavar="N", help="Exact tokens at the begin.")] = 4,
    context: Annotated[
        str, typer.Option("--context", metavar="N|max", help="Tokens per sequence; max: as many as fit.")
    ] = "8192",
    batch: Annotated[int, typer.Option("--batch", metavar="B", min=1, help="Sequences at a time.")] = 1,
    chunk: Annotated[int, typer.Option("--chunk", metavar="N", min=1, help="Tokens of a prompt at a time.")] = 2048,
    mode: Annotated[
        str, typer.Option("--mode", metavar="LIST", help="bf16, exact, fused; df11: DFloat11 as published.")
    ] = "bf16,exact,fused",
    bits: Annotated[
        float | None,
        typer.Option("--bits-per-weight", metavar="X", help="Of compressed weights, if you know better."),
    ] = None,
    reserve: Annotated[
        float | None, typer.Option("--reserve", metavar="GB", min=0, help="Kept free on each GPU; default 0.9, CPU 0.")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="SIZE", help="Memory for blocks off the GPUs: 64GB; else enough.")
    ] = None,
    link: Annotated[
        float | None, typer.Option("--link", metavar="GB/s", help="From there to a GPU; default: its data sheet's.")
    ] = None,
    disk: Annotated[float | None, typer.Option("--disk", metavar="GB/s", help="Of the disk; 3.5 assumed.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Save a picture: memory by setting and context."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Forecast memory, longest context and speed of a model on GPUs, from its config or headers alone.

    Nothing is loaded or run. Sizes are of the fullest GPU; tokens/s are upper estimates from bytes moved.
    """
    from bitforbit.cli import plan_offload
    from bitforbit.cli.plan_source import read
    from bitforbit.planner import make_plan

    if gpu.strip().lower() == "list":
        _show_gpus(json)
        return
    if not model:
        raise PlanError("expected a model: a directory, a config.json or a Hub model")
    if plot is not None:
        from bitforbit.cli.plot import check_plot

        check_plot(plot)
    shape = read(model)
    request = _request(shape, gpu, _split(shape, gpus, tensor, pipeline), context, batch, chunk, mode, bits, reserve,
                       _caches(kv, kv_group, kv_residual, kv_sink))  # fmt: skip
    plan = make_plan(plan_offload.beside(request, host, link, disk))
    if json:
        output.print_json(_facts(model, plan))
    else:
        _show(model, plan)
    if plot is not None:
        from bitforbit.cli.plan_plot import save_plot

        save_plot(plot, model, plan)
        if not json:
            output.print_line(f"picture in {plot}")


def _split(shape: Shape, gpus: int | None, tensor: int | None, pipeline: int | None) -> Split:
    from bitforbit.planner import Split

    if gpus is not None and tensor is None and pipeline is None:
        tensor, pipeline = 1, gpus
    elif gpus is not None:
        known = tensor or pipeline or 1
        if gpus % known or (tensor and pipeline and tensor * pipeline != gpus):
            raise PlanError(f"--gpus {gpus}: expected --tp times --pp, got {tensor or 1} x {pipeline or 1}")
        tensor, pipeline = tensor or gpus // known, pipeline or gpus // known
    split = Split(tensor or 1, pipeline or 1)
    split.check(shape)
    return split


def _caches(names: str, group: int, residual: int, sink: int) -> tuple[KvSetting, ...]:
    from bitforbit.integrations.generation.kv import parse
    from bitforbit.planner import KvSetting

    choices = [parse(name, group, residual, sink) for name in names.split(",")]
    return tuple({choice.name: KvSetting(choice.name, choice.spec) for choice in choices}.values())


def _request(
    shape: Shape, gpu: str, split: Split, context: str, batch: int, chunk: int, mode: str, bits: float | None,
    reserve: float | None, caches: tuple[KvSetting, ...],
) -> Request:  # fmt: skip
    from bitforbit.planner import METHODS, Request, find_gpu

    methods = tuple(dict.fromkeys(name.strip().lower() for name in mode.split(",")))
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise PlanError(f"--mode: expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    return Request(
        shape=shape,
        gpu=find_gpu(gpu),
        split=split,
        context=_context(context),
        batch=batch,
        call=chunk,
        methods=methods,
        caches=caches,
        bits=bits,
        reserve=None if reserve is None else round(reserve * 1e9),
    )


def _context(text: str) -> int | None:
    if text.strip().lower() == "max":
        return None
    plain = text.replace(",", "").replace("_", "").strip().lower()
    number, factor = (plain[:-1], 1024) if plain.endswith("k") else (plain, 1)
    if not number.isdecimal() or not int(number):
        raise PlanError(f"--context: expected a number of tokens such as 32768 or 32k, or max, got {text!r}")
    return int(number) * factor


def _show_gpus(json: bool) -> None:
    from bitforbit.planner import GPUS

    if json:
        output.print_json(
            {"gpus": [{"name": g.name, "memory_bytes": g.memory, "bandwidth": g.bandwidth} for g in GPUS]}
        )
        return
    rows = [[gpu.name, f"{gpu.memory >> 30} GiB", f"{(gpu.bandwidth or 0) / 1e9:,.0f} GB/s"] for gpu in GPUS]
    output.print_table(("GPU", "memory", "bandwidth"), rows)
    output.print_line("From NVIDIA's data sheets. Others: a size (80GB, 80GiB); CPU is this machine, CPU:16GB another.")


def _facts(model: str, plan: Plan) -> dict[str, Any]:
    from bitforbit.cli import plan_offload

    request, shape = plan.request, plan.request.shape
    return {
        "model": model,
        "family": shape.name,
        "sizes_from": shape.sizes_from,
        "parameters": shape.parameters,
        "original_bytes": shape.original_bytes,
        "disk_bytes": _disk_bytes(shape)[0],
        "disk_from": _disk_bytes(shape)[1],
        "limit": shape.dimensions.limit,
        "gpu": request.gpu.name,
        "gpu_bytes": request.gpu.memory,
        "usable_bytes": request.capacity,
        "tensor_parallel": request.split.tensor,
        "pipeline_parallel": request.split.pipeline,
        "batch": request.batch,
        "settings": [_row_facts(row) for row in plan.rows],
        **plan_offload.facts(plan),
        "fits": any(row.fits for row in plan.rows),
        "advice": list(plan.advice),
        "notes": _notes(plan),
    }


def _notes(plan: Plan) -> list[str]:
    shape, context = plan.request.shape, plan.request.context
    notes = [*shape.notes, *plan.skipped]
    limit = shape.dimensions.limit
    if limit is not None and context is not None and context > limit:
        notes.append(f"the model was made for {limit:,} tokens")
    return notes


def _row_facts(row: Row) -> dict[str, Any]:
    return {
        "mode": row.method,
        "kv": row.kv,
        "lossy": row.lossy,
        "context": row.context,
        **{f"{name}_bytes": value for name, value in asdict(row.memory).items()},
        "total_bytes": row.memory.total,
        "fits": row.fits,
        "longest_context": row.longest,
        "tokens_per_second_estimate": row.speed,
        "all_weights_bytes": row.compressed_bytes,
        "weights_from": row.weights_source,
    }


def _disk_bytes(shape: Shape) -> tuple[int | None, str]:
    """Size of the compressed model on disk, and where that is from."""
    from bitforbit.planner.weights import PLANES_BITS

    bits = shape.compressed_bits
    if bits is not None:
        return round(shape.parameters * bits / 8), f"{bits:.2f} bits per weight, the compressed tensors"
    estimate = PLANES_BITS.get(shape.dimensions.dtype)
    if estimate is None:
        return None, ""
    return round(shape.parameters * estimate / 8), f"{estimate:g} bits per weight (estimate)"


def _show(model: str, plan: Plan) -> None:
    from bitforbit.cli import plan_offload
    from bitforbit.planner.advice import describe

    request, shape = plan.request, plan.request.shape
    d = shape.dimensions
    disk, source = _disk_bytes(shape)
    compressed = "unknown: compress it" if disk is None else f"{output.size(disk)}: {source}"
    limit = "" if d.limit is None else f", made for {d.limit:,}"
    split = "" if request.split.gpus == 1 else f"{request.split.gpus} x "
    how = "" if request.split.gpus == 1 else f" ({describe(request.split)})"
    usable = f"{output.size(request.capacity)} usable of {output.size(request.gpu.memory)}"
    context = "as long as fits" if request.context is None else f"{request.context:,} tokens"
    facts = [
        ("model", f"{shape.name}, {shape.parameters:,} parameters, {d.dtype} ({shape.sizes_from})"),
        ("uncompressed", output.size(shape.original_bytes)),
        ("on disk", compressed),
        ("GPU", f"{split}{request.gpu.name}{how}, {usable}"),
        ("context", f"{context}{limit}; batch {request.batch}, prompts read {request.call:,} tokens at a time"),
    ]
    output.print_facts(model, facts)
    output.print_line()
    output.print_table(_HEADINGS, [_cells(row) for row in plan.rows], left=2)
    output.print_line()
    output.print_line("Of the fullest GPU. tokens/s: upper estimate, bytes moved over the data sheet's bandwidth.")
    sources = dict.fromkeys(row.weights_source for row in plan.rows if row.weights_source)
    if sources:
        output.print_line(f"Compressed weights: {'; '.join(sources)}.")
    if any(row.method == "exact" for row in plan.rows):
        output.print_line("exact: as if every weight were decoded; where orders of sums are proven, it is as fused.")
    lossy = ", ".join(dict.fromkeys(row.kv for row in plan.rows if row.lossy))
    if lossy:
        output.print_line(f"KV {lossy}: lossy.")
    plan_offload.show(plan)
    for line in _notes(plan):
        output.print_line(f"note: {line}")
    for line in plan.advice:
        output.print_line(f"does not fit; {line}")


def _cells(row: Row) -> list[str]:
    memory = row.memory
    sizes = [memory.weights, memory.scratch, memory.kv, memory.activations, memory.total]
    from bitforbit.planner.request import LONGEST

    longest = "any" if row.longest >= LONGEST // 2 else f"{row.longest:,}" if row.longest else "-"
    speed = "-" if row.speed is None or not row.fits else f"{row.speed:,.1f}"
    return [row.method, row.kv, *(output.size(size) for size in sizes), "yes" if row.fits else "no", longest, speed]
