"""Claim: a model that does not fit on the GPU generates faster compressed than in BF16, with the same GPU memory.

A Llama of Llama-3.1-8B's shape (fewer layers by default) with random weights. A share of its bytes in BF16 may be taken
by weights on the GPU, slots included, and torch's allocator is held to that and an allowance for the rest; the last
decoder layers are in host memory. One after the other, each alone on the GPU, greedily, without graphs:

    accelerate BF16   accelerate's hooks fetch the tensors of a module when it runs, from pageable memory
    streamed BF16     plain layers, from pinned memory, the next ones on their way: what streaming alone brings
    streamed exact    compressed layers: fewer bytes per layer, and more layers that stay
    streamed fused    the same, multiplied straight from compressed weights

The gate: logits of every step are those of the BF16 model that is on the GPU as a whole, bit for bit (fused: near, and
the same in a second run). Beside the times: bytes over the link, their rate against that of a copy from pinned memory,
and the least time that the copies need as a share of the step, which is 100 % where everything else is hidden.

    python -m benchmarks.gpu_offload [--layers 16] [--dry-run] [--json FILE]
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks import gpu_common
from benchmarks.common import table
from benchmarks.gpu_common import Meter, Report, same_bits
from benchmarks.gpu_model import FULL as MODEL
from benchmarks.gpu_model import TINY as TINY_MODEL
from benchmarks.gpu_model import WAYS as COMPUTING
from benchmarks.gpu_model import Size, build, near
from bitforbit.nn import compress_model, prove_orders, set_layout
from bitforbit.offload import AHEAD, Stream, slot_sizes, stream_blocks
from bitforbit.ops import gpu

WAYS = ("accelerate BF16", "streamed BF16", "streamed exact", "streamed fused")
SHARES, TINY_SHARES = (0.5,), (0.7,)
ALLOWANCE = 4 << 30
"""Bytes beside weights and slots: decoded weights, activations, keys and values, what the allocator loses."""
COPY_BYTES = 1 << 28
FULL = replace(MODEL, layers=16, context=16, steps=8)
TINY = replace(TINY_MODEL, layers=5, steps=2)


@dataclass(frozen=True)
class Placed:
    """A model with its last layers elsewhere. ``stream``: None where accelerate fetches them."""

    model: nn.Module
    resident: int
    link_bytes: int
    """That come to the GPU at every step."""
    stream: Stream | None


def weight_bytes(module: nn.Module) -> int:
    """Of all parameters, as they are kept."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in module.parameters()}.values())


def resident_layers(layers: list[int], others: int, budget: int, slots: int) -> int:
    """How many layers stay, if the others and as many slots as the rest needs are to fit, too."""
    for count in range(len(layers), -1, -1):
        if others + sum(layers[:count]) + sum(slot_sizes(layers[count:], slots - 1)) <= budget:
            return count
    return 0


def place(way: str, size: Size, budget: int, meter: Meter) -> Placed:
    """A model of its own, within the budget. Raises AssertionError if every layer would stay."""
    how, _, weights = way.partition(" ")
    model = build(size, meter.device)
    if weights != "BF16":
        compress_model(model)
        set_layout(model, "tiles")
        prove_orders(model, (1, size.context), (3,))
    layers = [weight_bytes(layer) for layer in model.model.layers]
    others = weight_bytes(model) - sum(layers)
    resident = resident_layers(layers, others, budget, 1 if how == "accelerate" else AHEAD + 1)
    if resident == len(layers):
        raise AssertionError(f"{way}: expected a budget that some layers exceed, got {budget} for {sum(layers)} bytes")
    names = [f"model.layers.{i}" for i in range(resident, len(layers))]
    blocks = {name: model.get_submodule(name) for name in names}
    if how == "streamed":
        stream = stream_blocks(blocks, meter.device, ahead=AHEAD)
        return Placed(model, resident, stream.host_bytes, stream)
    from accelerate import dispatch_model

    for block in blocks.values():
        block.to("cpu")
    placed = [name for name, module in model.named_modules() if _is_placed(name, module)]
    if meter.measures:
        here: Any = meter.device.index
        dispatch_model(model, {name: "cpu" if name in blocks else here for name in placed}, main_device=here)
    else:
        dispatch_model(model, dict.fromkeys(placed, "cpu"), force_hooks=True)
    return Placed(model, resident, sum(layers[resident:]), None)


def _is_placed(name: str, module: nn.Module) -> bool:
    """Decoder layers, and what is beside them."""
    in_layers = name.startswith("model.layers")
    return name.count(".") == 2 if in_layers else bool(name) and not list(module.children())


@torch.no_grad()
def run(model: nn.Module, size: Size, meter: Meter) -> tuple[torch.Tensor, float | None, float | None]:
    """Logits ``[steps + 1, vocabulary]``, and seconds until the first token and of a step after it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    generator = torch.Generator(meter.device).manual_seed(0)
    tokens = torch.randint(size.vocabulary, (1, size.context), device=meter.device, generator=generator)
    found, times = [], [_now(meter)]
    for _ in range(size.steps + 1):
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(output.logits[0, -1].clone())
        tokens = found[-1].argmax()[None, None]
        if len(times) == 1:
            times.append(_now(meter))  # the first token
    times.append(_now(meter))
    logits = torch.stack(found)
    if not meter.measures:
        return logits, None, None
    return logits, times[1] - times[0], (times[2] - times[1]) / size.steps


def _now(meter: Meter) -> float:
    if meter.measures:
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def capped(nbytes: int, meter: Meter) -> Iterator[None]:
    """Within this context torch may take so much memory on the GPU."""
    if not meter.measures:
        yield
        return
    total = torch.cuda.get_device_properties(meter.device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), meter.device)
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, meter.device)


def copy_gb_per_s(meter: Meter) -> float | None:
    """Of one copy from pinned memory."""
    if not meter.measures:
        return None
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=meter.device)
    milliseconds = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        there.copy_(host, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return COPY_BYTES / statistics.median(milliseconds[1:]) / 1e6


def measure_way(
    way: str, size: Size, budget: int, reference: torch.Tensor, copy: float | None, meter: Meter
) -> dict[str, Any]:
    """One way, after its gate. Raises AssertionError."""
    placed = place(way, size, budget, meter)
    gc.collect()
    kind = way.partition(" ")[2]
    computing = contextlib.nullcontext() if kind == "BF16" else COMPUTING[kind].of(placed.model)
    with capped(budget + ALLOWANCE, meter), computing:
        runs = [run(placed.model, size, meter) for _ in range(2)]
        for logits, _, _ in runs:
            if kind == "fused":
                near(logits[0], reference[0], f"{way}: logits of the first step")
                same_bits(logits, runs[0][0], f"{way}: logits of a second run")
            else:
                same_bits(logits, reference, f"{way}: logits")
        peak = torch.cuda.max_memory_allocated() if meter.measures else None
    _, first, step = runs[1]
    rate = None if step is None else placed.link_bytes / step / 1e9
    result = {
        "way": way,
        "budget_bytes": budget,
        "resident_layers": placed.resident,
        "layers": size.layers,
        "link_bytes": placed.link_bytes,
        "slot_bytes": 0 if placed.stream is None else placed.stream.slot_bytes,
        "late": None if placed.stream is None else placed.stream.fetched[1],
        "first_token_ms": None if first is None else 1000 * first,
        "step_ms": None if step is None else 1000 * step,
        "gb_per_s": rate,
        "of_copy": None if rate is None or not copy else rate / copy,
        "peak_bytes": peak,
    }
    del placed
    gc.collect()
    gpu.clear()
    return result


def measure(size: Size, shares: tuple[float, ...], meter: Meter, report: Report) -> None:
    """All of it."""
    whole = build(size, meter.device)
    bf16_bytes = weight_bytes(whole)
    run(whole, size, meter)  # libraries choose kernels
    reference, first, step = run(whole, size, meter)
    del whole
    gc.collect()
    copy = copy_gb_per_s(meter)
    report.put(
        layers=size.layers,
        bf16_bytes=bf16_bytes,
        copy_gb_per_s=copy,
        on_the_gpu={
            "first_token_ms": None if first is None else 1000 * first,
            "step_ms": None if step is None else 1000 * step,
        },
    )
    lines: list[dict[str, Any]] = []
    ways = [way for way in WAYS if not way.startswith("accelerate") or importlib.util.find_spec("accelerate")]
    for share in shares:
        for way in ways:
            budget = round(share * bf16_bytes)
            found = report.attempt(
                f"{share:.0%}, {way}",
                lambda way=way, budget=budget: measure_way(way, size, budget, reference, copy, meter),
            )
            lines += [{"share": share, **found}] if found else []
            report.put(ways=lines)


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    rows = []
    for line in result.get("ways", ()):
        share = line["of_copy"]
        rows.append(
            [
                f"{line['share']:.0%} {line['way']}",
                f"{line['resident_layers']} of {line['layers']}",
                f"{line['link_bytes'] / 1e9:.2f}",
                gpu_common.cell(line["step_ms"], ".1f"),
                gpu_common.cell(line["gb_per_s"]),
                gpu_common.cell(None if share is None else 100 * share, ".0f"),
                gpu_common.cell(None if line["peak_bytes"] is None else line["peak_bytes"] / 1e9, ".2f"),
            ]
        )
    headers = ["", "layers kept", "GB over the link", "step, ms", "GB/s", "% of a copy's", "peak, GB"]
    copy = gpu_common.cell(result["copy_gb_per_s"])
    return "\n".join([table(headers, rows), f"A copy from pinned memory: {copy} GB/s"])


def main(arguments: list[str]) -> int:
    """Measure and print."""
    options = gpu_common.parser(__doc__)
    options.add_argument("--layers", type=int, default=FULL.layers, help="of Llama-3.1-8B's 32")
    options.add_argument("--share", type=float, action="append", help="of the bytes in BF16, for weights and slots")
    chosen = options.parse_args(arguments)
    size = TINY if chosen.dry_run else replace(FULL, layers=chosen.layers)
    report = Report(chosen.json)
    with gpu_common.meter(chosen.dry_run) as meter:
        measure(size, tuple(chosen.share or (TINY_SHARES if chosen.dry_run else SHARES)), meter, report)
    print(show(report.result))
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
