"""Products with compressed matrices against torch's BF16 linear and our own, on every linear of Llama-3.1-8B.

Each column is a way of multiplying: ``exact`` is what exact mode does (the order proven to be torch's, else
``decoded``: decode, then torch's product). Several copies of a matrix take turns, so that none is in a cache; the
columns take turns too, and medians count. Before anything is timed, the compressed products must equal those from plain
BF16 in the same order bit for bit, and outputs of exact mode are compared with torch's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.common import Bytes, gaussian_bf16, save, table
from bitforbit import cpu
from bitforbit.cpu import linear as native
from bitforbit.cpu import planes
from bitforbit.cpu.linear import LANES, Order

SHAPES = {
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "gate, up": (14336, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
TOKENS = (1, 4, 8, 16)
BYTES_AT_LEAST = 3 << 27
"""Size of all copies of one matrix in BF16: far more than any cache."""


@dataclass
class Matrix:
    """Copies of one matrix, plain and compressed, each in memory of its own."""

    rows: int
    cols: int
    rows_per_table: int
    plain: list[Bytes]
    parts: list[dict[str, Bytes]]

    @property
    def bits_per_weight(self) -> float:
        """Of the four parts together."""
        return 8 * sum(part.size for part in self.parts[0].values()) / (self.rows * self.cols)


@dataclass
class Inputs:
    """Activations and room for the outputs, BF16."""

    tokens: int
    x: Bytes
    out: Bytes


Column = Callable[[Matrix, Inputs, int], Callable[[], object]]
"""(matrix, inputs, threads) -> a function that multiplies by every copy once."""


def make_matrix(rows: int, cols: int) -> Matrix:
    """Gaussian weights; rows repeat after 4096."""
    words = np.resize(gaussian_bf16(min(rows, 4096), cols), (rows, cols)).reshape(-1).view(np.uint8)
    copies = max(1, -(-BYTES_AT_LEAST // words.size))
    rows_per_table, parts = planes.encode(words, "BF16", False, rows, cols, 0, cpu.default_threads())
    plain = [own(words) for _ in range(copies)]
    return Matrix(rows, cols, rows_per_table, plain, [{k: own(v) for k, v in parts.items()} for _ in range(copies)])


def own(data: Bytes) -> Bytes:
    """A copy on a 64-byte boundary."""
    out = planes.empty(data.size)
    out[:] = data
    return out


def make_inputs(matrix: Matrix, tokens: int) -> Inputs:
    """Gaussian activations."""
    x = gaussian_bf16(tokens, matrix.cols, seed=1).reshape(-1).view(np.uint8)
    return Inputs(tokens, own(x), planes.empty(2 * tokens * matrix.rows))


def compressed(order: Order, isa: str = "") -> Column:
    """Our product from compressed weights in that order."""

    def column(matrix: Matrix, inputs: Inputs, threads: int) -> Callable[[], object]:
        geometry = (matrix.rows, matrix.cols, matrix.rows_per_table)

        def run() -> None:
            with cpu.force(isa or cpu.active()):
                for parts in matrix.parts:
                    native.linear(parts, geometry, inputs.x, "BF16", inputs.out, None, "F32", order, threads)

        return run

    return column


def plain(order: Order) -> Column:
    """Our product from plain BF16 in that order."""

    def column(matrix: Matrix, inputs: Inputs, threads: int) -> Callable[[], object]:
        def run() -> None:
            for weight in matrix.plain:
                native.linear_dense(
                    weight, (matrix.rows, matrix.cols), inputs.x, "BF16", inputs.out, None, "F32", order, threads
                )

        return run

    return column


def torch_linear(matrix: Matrix, inputs: Inputs, threads: int) -> Callable[[], object]:
    """torch.nn.functional.linear."""
    import torch

    def tensor(data: Bytes, cols: int) -> torch.Tensor:
        return torch.from_numpy(data).view(torch.bfloat16).view(-1, cols)

    weights = [tensor(weight, matrix.cols) for weight in matrix.plain]
    x = tensor(inputs.x, matrix.cols)

    def run() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(x, weight)

    return run


def proven(matrix: Matrix, inputs: Inputs, threads: int) -> Order | None:
    """The order in which torch computes this product, if exact mode knows one."""
    import torch

    from bitforbit.ops import proven as orders

    torch.set_num_threads(threads)
    return orders.lookup(matrix.rows, matrix.cols, inputs.tokens, threads, False, torch.bfloat16)


def decoded(matrix: Matrix, inputs: Inputs, threads: int) -> Callable[[], object]:
    """Decode to memory that is used again, then torch's product."""
    scratch = planes.empty(2 * matrix.rows * matrix.cols)
    product = torch_linear(replace(matrix, plain=[scratch]), inputs, threads)
    shape = (matrix.rows, matrix.cols, matrix.rows_per_table)

    def run() -> None:
        for parts in matrix.parts:
            planes.decode(parts, "BF16", False, shape, (0, matrix.rows), scratch, threads)
            product()

    return run


def exact(matrix: Matrix, inputs: Inputs, threads: int) -> Callable[[], object]:
    """What exact mode does."""
    order = proven(matrix, inputs, threads)
    return compressed(order)(matrix, inputs, threads) if order else decoded(matrix, inputs, threads)


COLUMNS: dict[str, Column] = {
    "torch": torch_linear,
    "exact": exact,
    "fused": compressed(LANES),
    "decoded": decoded,
    "own BF16": plain(LANES),
}


def differing(matrix: Matrix, inputs: Inputs, threads: int) -> int:
    """Outputs of exact mode whose bits are not torch's."""
    import torch

    order = proven(matrix, inputs, threads)
    if order is None:
        return 0
    weight = torch.from_numpy(matrix.plain[0]).view(torch.bfloat16).view(matrix.rows, matrix.cols)
    x = torch.from_numpy(inputs.x).view(torch.bfloat16).view(-1, matrix.cols)
    expected = torch.nn.functional.linear(x, weight).view(torch.int16).view(-1)
    compressed(order)(replace(matrix, parts=matrix.parts[:1]), inputs, threads)()
    return int((torch.from_numpy(inputs.out).view(torch.int16) != expected).sum())


def check(order: Order, matrix: Matrix, inputs: Inputs) -> None:
    """The gate: compressed and plain weights give the same bits."""
    threads = cpu.default_threads()
    compressed(order)(matrix, inputs, threads)()
    got = inputs.out.copy()
    inputs.out[:] = 0
    plain(order)(matrix, inputs, threads)()
    if not np.array_equal(got, inputs.out):
        raise AssertionError(f"{order}: the products of {matrix.rows} x {matrix.cols} differ")


def medians(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each function; they take turns for about that long in all, at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm-up
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    columns: dict[str, Column],
    shapes: dict[str, tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    threads: Sequence[int] = (),
    orders: Sequence[Order] = (LANES,),
    seconds: float = 3.0,
) -> list[dict[str, Any]]:
    """GB/s of BF16 weights for every column, shape, number of tokens and of threads; the orders are gated first."""
    results = []
    for name, (rows, cols) in shapes.items():
        matrix = make_matrix(rows, cols)
        nbytes = sum(weight.size for weight in matrix.plain)
        for count in tokens:
            inputs = make_inputs(matrix, count)
            for order in orders:
                check(order, matrix, inputs)
            for workers in threads or sorted({1, cpu.default_threads()}):
                functions = {label: column(matrix, inputs, workers) for label, column in columns.items()}
                speeds = {label: round(nbytes / s / 1e9, 2) for label, s in medians(functions, seconds).items()}
                print(f"{name} {rows} x {cols}, {count} tokens, {workers} threads: {speeds}", flush=True)
                order = proven(matrix, inputs, workers)
                results.append(
                    {
                        "name": name, "rows": rows, "cols": cols, "tokens": count, "threads": workers,
                        "bits_per_weight": round(matrix.bits_per_weight, 4), "gb_per_s": speeds,
                        "order": None if order is None else [order.family, order.k_block],
                        "differing": differing(matrix, inputs, workers),
                    }
                )  # fmt: skip
    return results


def run(columns: dict[str, Column] | None = None) -> dict[str, Any]:
    """Measure, print and save."""
    results = measure(columns or COLUMNS)
    isas = [name for name, supported in cpu.implementations().items() if supported and name != "scalar"]
    q = {"q, o": SHAPES["q, o"]}
    by_isa = measure(
        {"torch": torch_linear} | {name: compressed(LANES, name) for name in isas}, q, (1, 8), (1,), seconds=6.0
    )
    for result in [*results, *by_isa]:
        result["speedup"] = {k: round(v / result["gb_per_s"]["torch"], 2) for k, v in result["gb_per_s"].items()}
    for title, part in (("Every linear of Llama-3.1-8B", results), ("One matrix on every instruction set", by_isa)):
        labels = list(part[0]["gb_per_s"])
        rows = [
            [
                r["name"], f"{r['rows']} x {r['cols']}", r["tokens"], r["threads"],
                *(f"{r['gb_per_s'][k]:.1f} ({r['speedup'][k]:.2f}x)" for k in labels),
            ]
            for r in part
        ]  # fmt: skip
        print(f"\n{title}: GB/s of BF16 weights multiplied\n")
        print(table(["linear", "N x K", "tokens", "threads", *labels], rows))
    summary = {"products": results, "instruction_sets": by_isa}
    save("cpu_linear", summary)
    return summary


if __name__ == "__main__":
    run()
