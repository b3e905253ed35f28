"""Claim: a token's attention over a quantized cache is faster than FlashAttention's over a BF16 one.

Heads of Llama-3.1-8B (32 of queries, 8 of keys, 128 channels), caches of 32 K and 128 K tokens, batches of 1 and 16,
keys and values of 4 bits, 4 and 2, 2, groups of 32. Before anything is timed, attention over each kind of cache has to
have at most twice the error of plain BF16 attention, against FP64 over the same quantized numbers. Then all sides take
turns, in CUDA graphs, over more caches than L2 holds. BF16 is scaled_dot_product_attention by its flash back end, with
the queries that share keys as heads of their own or as one head's queries; the ratio is that of the faster one. The
bound is the time in which a copy moves as many bytes as the cache has. "4 blocks" is the same kernel compiled for four
blocks of a multiprocessor. Beside it: the step that packs what leaves the window, and a prompt's.

    python -m benchmarks.gpu_kv [--dry-run] [--json FILE]
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_common
from benchmarks.common import table
from benchmarks.gpu_common import Graph, Meter, Report
from benchmarks.gpu_decode import FULL as DECODE_FULL
from benchmarks.gpu_decode import TINY as DECODE_TINY
from benchmarks.gpu_decode import copy as copy_within_memory
from bitforbit.kv import kernels
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState

attending = importlib.import_module("bitforbit.cuda.kv.attend")  # the package has a function of that name

BITS = ((4, 4), (4, 2), (2, 2))
PLAIN = ("bf16", "bf16, one head")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """What is attended to."""

    query_heads: int
    heads: int
    head_dim: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    checked: int
    """Tokens of the comparison with FP64."""
    copy_bytes: int


FULL = Size(32, 8, 128, (32 << 10, 128 << 10), (1, 16), 6000, DECODE_FULL.copy_bytes)
TINY = Size(4, 2, 32, (700,), (1, 2), 600, DECODE_TINY.copy_bytes)


def random(meter: Meter, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, dtype=DTYPE, device=meter.device)


def filled(meter: Meter, size: Size, bits: tuple[int, int], k: Tensor, v: Tensor) -> KvState:
    """A cache of tokens [B, H, T, D], the last of which is the step's own."""
    spec = KiviSpec(*bits, 32)
    state = KvState(spec, len(k), size.heads, size.head_dim, dtype=DTYPE, device=meter.device)
    state.append(k[:, :, :-1], v[:, :, :-1])
    state.flush()
    state.append(k[:, :, -1:], v[:, :, -1:])
    return state


def attend(state: KvState, q: Tensor) -> Tensor:
    """A step's attention, by the kernels."""
    return kernels.attend(state, q, None, q.shape[-1] ** -0.5, None, None)


def plain(q: Tensor, k: Tensor, v: Tensor, one_head: bool) -> Tensor:
    """A step's attention over exact numbers."""
    if one_head:  # nothing is hidden from a step's query, so queries that share keys may pass for tokens
        return functional.scaled_dot_product_attention(q.view(len(k), k.shape[1], -1, q.shape[-1]), k, v).view_as(q)
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def check(meter: Meter, size: Size, bits: tuple[int, int]) -> dict[str, float]:
    """Errors against FP64 over the quantized numbers. Raises AssertionError."""
    k, v = (random(meter, 2, size.heads, size.checked, size.head_dim) for _ in range(2))
    q = random(meter, 2, size.query_heads, 1, size.head_dim)
    state = filled(meter, size, bits, k, v)
    k, v = state.dequantized()
    exact = plain(q.double(), k.double(), v.double(), one_head=True)
    results = {"kernel": attend(state, q), "bf16": plain(q, k.to(DTYPE), v.to(DTYPE), one_head=True)}
    errors = {name: float((out.double() - exact).norm() / exact.norm()) for name, out in results.items()}
    if not errors["kernel"] <= 2 * errors["bf16"]:
        raise AssertionError(f"expected at most twice the error of BF16, got {errors}")
    return errors


@contextlib.contextmanager
def blocks(number: int) -> Iterator[None]:
    """Kernels are compiled for so many blocks of a multiprocessor."""
    before = attending.kernels

    def other(defines: Any) -> tuple[Any, Any]:
        parts, join = before(defines)
        return replace(parts, defines=(*parts.defines, ("BITFORBIT_BLOCKS", str(number)))), join

    attending.kernels = other
    try:
        yield
    finally:
        attending.kernels = before


def flash(meter: Meter) -> Any:
    """Only the flash back end, where it is measured."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if meter.measures else contextlib.nullcontext()


def lines_of(
    meter: Meter, size: Size, context: int, batch: int, copy_gb_per_s: float | None, report: Report
) -> list[dict[str, Any]]:
    """The results for a context and a batch, a line for each kind of cache."""
    shape = (batch, size.heads, context, size.head_dim)
    plain_bytes = 2 * DTYPE.itemsize * batch * size.heads * context * size.head_dim
    caches = [(random(meter, *shape), random(meter, *shape)) for _ in range(meter.rotations(plain_bytes))]
    q = random(meter, batch, size.query_heads, 1, size.head_dim)
    graphs: dict[str, Graph] = {}
    with flash(meter):
        for name in PLAIN:
            calls = [lambda k=k, v=v, o=name == PLAIN[1]: plain(q, k, v, o) for k, v in caches]
            found = report.attempt(f"{name}, {context} x {batch}", lambda calls=calls: meter.capture(calls))
            graphs |= {} if found is None else {name: found}
    nbytes: dict[str, int] = {}
    for bits in BITS:
        name = "k{}v{}".format(*bits)
        states = [filled(meter, size, bits, *cache) for cache in caches]
        # More of them, so that together they are as far beyond the L2 cache.
        more = meter.rotations(states[0].nbytes) - len(states)
        states += [filled(meter, size, bits, *caches[i % len(caches)]) for i in range(more)]
        nbytes[name] = states[0].nbytes
        graphs[name] = meter.capture([lambda s=s: attend(s, q) for s in states])
        with blocks(4):
            graphs[f"{name}, 4 blocks"] = meter.capture([lambda s=s: attend(s, q) for s in states])
        graphs[f"{name}, pack"] = meter.capture(
            [lambda s=s: kernels.flush(s, s.flushed, s.slots, None) for s in states]
        )
    rounds = meter.in_turns(graphs)
    prompt = meter.eager_microseconds(lambda: filled(meter, size, BITS[1], *caches[0]))
    return [
        {
            "context": context, "batch": batch, "cache": name, "nbytes": count,
            "bits_per_element": 8 * DTYPE.itemsize * count / plain_bytes,
            "prompt_us": prompt if name == "k4v2" else None,
            **figures(rounds, name, count, plain_bytes, copy_gb_per_s),
        }
        for name, count in nbytes.items()
    ]  # fmt: skip


def figures(
    rounds: dict[str, list[float]], name: str, nbytes: int, plain_bytes: int, copy_gb_per_s: float | None
) -> dict[str, Any]:
    """Times, speeds and ratios of a kind of cache; None where nothing was measured."""
    before = min((rounds[each] for each in PLAIN if rounds.get(each)), key=sum, default=[])
    medians = {each: gpu_common.median(rounds.get(each, [])) for each in (*PLAIN, name, f"{name}, 4 blocks")}
    ours, bound = medians[name], None if copy_gb_per_s is None else nbytes / copy_gb_per_s / 1e3
    return {
        "us": {each.replace(name, "packed"): value for each, value in medians.items()},
        "pack_us": gpu_common.median(rounds[f"{name}, pack"]),
        "ratio": gpu_common.median([a / b for a, b in zip(before, rounds[name], strict=bool(before))]),
        "gb_per_s": gpu_common.per_second(nbytes, ours),
        "bf16_gb_per_s": gpu_common.per_second(plain_bytes, gpu_common.median(before)),
        "of_bound": None if bound is None or ours is None else bound / ours,
    }


def measure(meter: Meter, size: Size, report: Report) -> None:
    """All of it."""
    copied = report.attempt("copy", lambda: copy_within_memory(meter, size.copy_bytes))
    speed = None if copied is None else gpu_common.per_second(copied.nbytes, copied.microseconds)
    lines: list[dict[str, Any]] = []
    errors: dict[str, Any] = {}
    report.put(copy_gb_per_s=speed, attention=lines, relative_errors=errors)
    for bits in BITS:
        name = "k{}v{}".format(*bits)
        errors[name] = report.attempt(name, lambda bits=bits: check(meter, size, bits))
    if None in errors.values():  # no figure without the gate
        return
    for context in size.contexts:
        for batch in size.batches:
            found = report.attempt(
                f"{context} x {batch}", lambda c=context, b=batch: lines_of(meter, size, c, b, speed, report)
            )
            lines.extend(found or [])
            report.put()
            if meter.measures:
                torch.cuda.empty_cache()


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    cell = gpu_common.cell
    names = (*PLAIN, "packed", "packed, 4 blocks")
    rows = [
        [
            str(line["context"]), str(line["batch"]), line["cache"], f"{line['bits_per_element']:.2f}",
            *(cell(line["us"][name]) for name in names), cell(line["gb_per_s"], ".0f"),
            cell(line["bf16_gb_per_s"], ".0f"), cell(line["of_bound"], ".0%"), cell(line["ratio"], ".2f"),
            cell(line["pack_us"]),
        ]
        for line in result["attention"]
    ]  # fmt: skip
    headers = ["tokens", "batch", "cache", "bits", *(f"{name}, us" for name in names), "packed, GB/s", "BF16, GB/s"]
    headers += ["of bound", "BF16 / packed", "packing a step, us"]
    return f"copy: {cell(result['copy_gb_per_s'], '.0f')} GB/s\n" + table(headers, rows)


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    chosen = gpu_common.parser(__doc__).parse_args(arguments)
    report = Report(chosen.json)
    with gpu_common.meter(chosen.dry_run) as meter, torch.inference_mode():
        torch.manual_seed(0)
        measure(meter, TINY if chosen.dry_run else FULL, report)
    print(show(report.result))
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
