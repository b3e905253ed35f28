"""Claim: products straight from compressed weights are faster than cuBLAS's with BF16, from 1 to 64 tokens.

The linears of Llama-3.1-8B, Qwen3-32B and Llama-3.1-70B, random weights; q, k, v and gate, up also as the one launch
that they are in a layer. Before anything is timed: fused products have the bits of the same sums from BF16 weights, for
any number of tokens, and are as close to FP64 as cuBLAS's. Then all sides take turns, in CUDA graphs over more weights
than the L2 cache holds. The ratio is the median over the rounds of BF16's time by fused's in the same round; for groups
BF16 is the faster of one product per matrix and one with all of them joined. The bound is the time in which a copy
moves as many bytes as the compressed weights have. Above 64 tokens fused mode decodes. Beside it, for the first model,
exact mode: by decoding (each weight right before its product, or the next one beside it), and straight from compressed
weights where a probe finds an order of sums that is cuBLAS's own.

With --kind F16 all is FP16, BF16's columns too; with F8_E4M3 weights are FP8, and torch casts them to BF16 before each
product. Orders are proven for BF16 alone.

    python -m benchmarks.gpu_linear [--kind F16] [--seconds 60 | --full] [--model NAME] [--dry-run] [--json FILE]
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import gpu_common
from benchmarks.common import table
from benchmarks.gpu_common import Graph, Meter, Report, same_bits
from benchmarks.gpu_decode import FULL as DECODE_FULL
from benchmarks.gpu_decode import TINY as DECODE_TINY
from benchmarks.gpu_decode import copy as copy_within_memory
from benchmarks.gpu_operands import Call, Operands
from benchmarks.gpu_shapes import MODELS, TOKENS, Shape
from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused.plan import MAX_TOKENS
from bitforbit.cuda.tiles import kinds
from bitforbit.ops import gpu, stats
from bitforbit.ops.gpu import Policy

POLICIES = {
    "exact, at use": Policy(ahead=0, proven_orders=False),
    "exact, ahead": Policy(proven_orders=False),
    "exact, proven": Policy(prove_after=None),
}
PLAIN = ("bf16", "bf16 joined")
SECONDS = 60
"""The first model always runs to its end, the others as far as this goes."""


@dataclass(frozen=True)
class Size:
    """What is multiplied."""

    shapes: tuple[Shape, ...]
    """The first model's are measured whatever it takes."""
    tokens: tuple[int, ...]
    exact_tokens: tuple[int, ...]
    copy_bytes: int


FULL = Size(
    tuple(shape for model in MODELS for shape in model.shapes), TOKENS, (1, 8, 32, 64, 128), DECODE_FULL.copy_bytes
)
TINY = Size(
    (Shape("tiny", "q+k+v", (48, 31, 16), 255), Shape("tiny", "down", (47,), 192)),
    (1, 9, 65),
    (1, 65),
    DECODE_TINY.copy_bytes,
)


@contextlib.contextmanager
def decoding(policy: Policy) -> Iterator[None]:
    """Nothing that was decoded before is left, and decoding follows the policy."""
    gpu.clear()
    with gpu.use_policy(policy), torch.inference_mode():
        yield


def exact(meter: Meter, operands: Operands, tokens: int, mode: str, policy: Policy) -> Graph:
    """A graph of the operator's products, after the comparison with torch's."""
    calls = operands.operator_products(tokens, mode)
    with decoding(policy):
        for got, expected in zip(calls, operands.torch_products(tokens), strict=True):
            for ours, theirs in zip(results(got), results(expected), strict=True):
                same_bits(ours, theirs, f"{operands.shape.name}: {mode}, {tokens} tokens")
        return meter.capture(calls)


def results(call: Call) -> list[torch.Tensor]:
    """What a call returns: a tensor of each matrix."""
    found = call()
    assert isinstance(found, list)
    return found


def proven(meter: Meter, operands: Operands, tokens: int) -> bool:
    """Whether a fused product with the bits of torch's own is known for the (only) matrix."""
    (rows,), cols = operands.shape.rows, operands.shape.cols
    product = gpu.Product(rows, cols, tokens, operands.x.dim(), gpu.ALIGNMENT, 0)
    return tokens <= MAX_TOKENS and gpu.prove([product], meter.device)[product] is not None


def sides(meter: Meter, operands: Operands, tokens: int, with_exact: bool) -> dict[str, Graph]:
    """What is compared, each as a graph."""
    graphs = {"bf16": meter.capture(operands.torch_products(tokens))}
    if len(operands.shape.rows) > 1:
        graphs["bf16 joined"] = meter.capture(operands.torch_joined(tokens))
    if tokens <= MAX_TOKENS:
        graphs["fused"] = meter.capture(operands.products(tokens))
    else:
        graphs["fused"] = exact(meter, operands, tokens, "fused", Policy())
    for name, policy in POLICIES.items() if with_exact else ():
        if policy.proven_orders and (operands.kind.name != "BF16" or not proven(meter, operands, tokens)):
            continue
        stats.reset()
        graphs[name] = exact(meter, operands, tokens, "exact", policy)
        if policy.proven_orders == (stats.snapshot()["fused_exact"].linears == 0):
            raise AssertionError(f"{operands.shape.name}, {name}: expected another way, got {stats.snapshot()}")
    return graphs


def products(
    meter: Meter, operands: Operands, tokens: int, with_exact: bool, copy_gb_per_s: float | None
) -> dict[str, Any]:
    """One line of the result."""
    shape = operands.shape
    rounds = meter.in_turns(sides(meter, operands, tokens, with_exact))
    line: dict[str, Any] = {
        "model": shape.model,
        "kind": shape.kind,
        "rows": shape.rows,
        "cols": shape.cols,
        "tokens": tokens,
        "way": "decoded",
        "nbytes": operands.nbytes,
        "bits_per_weight": 8 * operands.nbytes / shape.weights,
        "us": {name: gpu_common.median(values) for name, values in rounds.items()},
        **figures(rounds, operands.nbytes, copy_gb_per_s),
    }
    if tokens <= MAX_TOKENS:
        queue, order = gpu.queue_for(meter.device), operands.order
        plan = plans.plan(shape.rows, order, tokens, queue.properties, None, operands.kind)
        line |= {"way": "fused", "order": vars(order), "variant": vars(plan.variant)}
    return line


def figures(rounds: dict[str, list[float]], nbytes: int, copy_gb_per_s: float | None) -> dict[str, float | None]:
    """Speed, bound and ratio from the times of all sides by round; None where nothing was measured."""
    plain = min((rounds[name] for name in PLAIN if rounds.get(name)), key=sum, default=[])
    ratio = gpu_common.median([before / after for before, after in zip(plain, rounds["fused"], strict=True)])
    before, after = gpu_common.median(plain), gpu_common.median(rounds["fused"])
    bound = None if copy_gb_per_s is None else nbytes / copy_gb_per_s / 1e3
    return {
        "ratio": ratio,
        "gb_per_s": gpu_common.per_second(nbytes, after),
        "bound_us": bound,
        "of_bound": None if bound is None or after is None else bound / after,
        "ratio_at_bound": None if bound is None or before is None else before / bound,
    }


def measure(meter: Meter, size: Size, report: Report, seconds: float | None, kind: str = "BF16") -> None:
    """All of it."""
    begin = time.monotonic()
    copied = report.attempt("copy", lambda: copy_within_memory(meter, size.copy_bytes))
    speed = None if copied is None else gpu_common.per_second(copied.nbytes, copied.microseconds)
    lines: list[dict[str, Any]] = []
    errors: dict[str, dict[str, float]] = {}
    skipped: list[str] = []
    report.put(weights=kind, copy_gb_per_s=speed, products=lines, rms_errors=errors, no_time_for=skipped)
    for shape in size.shapes:
        first = shape.model == size.shapes[0].model
        if not first and seconds is not None and time.monotonic() - begin > seconds:
            skipped.append(shape.name)
            report.put()
            continue
        operands = report.attempt(shape.name, lambda shape=shape: checked(meter, shape, size.tokens, errors, kind))
        for tokens in size.tokens if operands is not None else ():
            with_exact = first and len(shape.rows) == 1 and tokens in size.exact_tokens
            line = report.attempt(
                f"{shape.name}, {tokens} tokens",
                lambda o=operands, t=tokens, e=with_exact: products(meter, o, t, e, speed),
            )
            lines.extend([line] if line else [])
            report.put()
        del operands
        gpu.clear()
        if meter.measures:
            torch.cuda.empty_cache()


def checked(
    meter: Meter, shape: Shape, tokens: tuple[int, ...], errors: dict[str, dict[str, float]], kind: str = "BF16"
) -> Operands:
    """Weights of a shape that have passed the gate, whose errors are noted. Raises AssertionError."""
    operands = Operands(meter, shape, kind=kind)
    errors[shape.name] = operands.check(tokens)
    return operands


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    cell = gpu_common.cell
    names = (*PLAIN, "fused", *POLICIES)
    lines = [
        [
            line["model"],
            line["kind"],
            f"{' + '.join(map(str, line['rows']))} x {line['cols']}",
            str(line["tokens"]),
            *(cell(line["us"][name]) if name in line["us"] else "" for name in names),
            cell(line["gb_per_s"], ".0f"),
            cell(line["bound_us"]),
            cell(line["of_bound"], ".0%"),
            cell(line["ratio"], ".2f"),
            cell(line["ratio_at_bound"], ".2f"),
        ]
        for line in result["products"]
    ]
    headers = ["model", "linear", "shape", "tokens", *(f"{name}, us" for name in names)]
    headers += ["fused, GB/s compressed", "bound, us", "of bound", "BF16 / fused", "at the bound"]
    skipped = [f"no time for {name}" for name in result["no_time_for"]]
    return "\n".join([f"copy: {cell(result['copy_gb_per_s'], '.0f')} GB/s", table(headers, lines), *skipped])


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    options = gpu_common.parser(__doc__)
    options.add_argument(
        "--seconds", type=float, default=SECONDS, help="after so many, no matrix of another model is begun"
    )
    options.add_argument("--kind", choices=kinds.NAMES, default="BF16", help="of the weights")
    options.add_argument("--full", action="store_true", help="all matrices, whatever it takes")
    options.add_argument("--model", choices=[model.name for model in MODELS], help="its matrices only")
    chosen = options.parse_args(arguments)
    size = TINY if chosen.dry_run else FULL
    if chosen.model and not chosen.dry_run:
        (model,) = (model for model in MODELS if model.name == chosen.model)
        size = Size(model.shapes, size.tokens, size.exact_tokens, size.copy_bytes)
    report = Report(chosen.json)
    with gpu_common.meter(chosen.dry_run) as meter:
        measure(meter, size, report, None if chosen.full else chosen.seconds, chosen.kind)
    print(show(report.result))
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
