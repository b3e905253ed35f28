"""In which order does torch's BF16 linear sum? Finds out by comparing bits with the orders that are on offer.

Ordinary inputs tell orders apart in one output of a thousand or less. Here every product occurs twice with opposite
signs at random places, so that an output is nothing but what the roundings left over: another order gives other bits
nearly everywhere. All outputs have to agree, on these inputs and on others: ordinary, of all magnitudes, tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bitforbit.cpu import linear as products
from bitforbit.cpu import planes
from bitforbit.cpu.linear import Order
from bitforbit.ops.probe_matrix import chunk_rows, repeated

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(x [tokens, cols], weight [rows, cols], bias [rows] or None) -> [tokens, rows], all BF16."""

UNITS = {"vdpbf16": 32, "tdpbf16": 32, "vdpbf16_emulated": 32, "lanes_pairwise": 0}
"""Families that may be torch's order; every size of their K blocks is a multiple of so many columns (0: no blocks)."""

_CHUNK_BYTES = 1 << 19
_SIEVE_ROWS = 16
_LIKELY_BLOCKS = (512, 1024, 0, 768, 2048, 256, 4096)  # as found on CPUs with AMX, AVX-512 BF16, plain AVX-512
_TELLING = 0.2  # share of outputs that an order known to be another must change, or the inputs prove nothing


@dataclass(frozen=True)
class Inputs:
    """Rows of a weight, activations, and a bias."""

    weight: torch.Tensor  # [rows, cols] BF16
    x: torch.Tensor  # [tokens, cols] BF16
    bias: torch.Tensor | None  # [rows] BF16


def find_order(
    linear: Linear,
    rows: int,
    cols: int,
    tokens: int,
    threads: int,
    has_bias: bool,
    families: Sequence[str] = tuple(UNITS),
) -> Order | None:
    """The order in which ``linear`` sums, or None if it is none of these families'.

    ``linear`` is called with weights of ``[rows, cols]``; the products it is compared with run on ``threads``.
    """
    rng = np.random.default_rng((rows, cols, tokens))
    count = chunk_rows(rows, cols, _CHUNK_BYTES // (2 * cols))
    probe = cancelling(rng, count, cols, tokens, has_bias)
    expected = _run(linear, probe, rows)
    if not _tells(probe, expected, threads):
        return None
    few = slice(0, min(_SIEVE_ROWS, count))
    for order in candidates(cols, families):
        sieved = _dense(Inputs(probe.weight[few], probe.x, None), order)
        if not torch.equal(sieved.view(torch.int16), expected[:, few].view(torch.int16)):
            continue
        if all(
            _agree(inputs, expected if inputs is probe else _run(linear, inputs, rows), order, threads)
            for inputs in (probe, *(make(rng, count, cols, tokens, has_bias) for make in (ordinary, wide, tiny)))
        ):
            return order
    return None


def candidates(cols: int, families: Sequence[str]) -> Iterator[Order]:
    """Orders to try, the likely ones first: every family with every size of K blocks that is a multiple of its unit."""
    half = -(-cols // 8) * 4  # oneDNN without AVX-512 BF16 halves what is a little too much for one block
    likely = list(dict.fromkeys(block for block in (*_LIKELY_BLOCKS, half) if block < cols))
    for family in families:
        yield from (Order(family, block) for block in likely if UNITS[family] or not block)
    for family in filter(UNITS.get, families):
        unit = UNITS[family]
        yield from (Order(family, block) for block in range(unit, cols, unit) if block not in likely)


def cancelling(rng: np.random.Generator, rows: int, cols: int, tokens: int, has_bias: bool) -> Inputs:
    """Every product twice, with opposite signs, at random places; the bias, if any, is zero.

    Magnitudes differ by up to 2^12, or few products would be summed without any rounding.
    """
    half = cols // 2
    place = rng.permutation(cols)
    weight, x = np.zeros((rows, cols), np.float32), np.ones((tokens, cols), np.float32)
    weight[:, : 2 * half] = np.tile(_spread(rng, rows, half), 2)
    weight[:, half:] *= -1
    x[:, : 2 * half] = np.tile(_spread(rng, tokens, half), 2)
    bias = torch.zeros(rows, dtype=torch.bfloat16) if has_bias else None
    return Inputs(_bf16(weight[:, place]), _bf16(x[:, place]), bias)


def _spread(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    scale = np.exp2(rng.integers(-6, 7, (rows, cols)))
    spread: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = (
        _bf16(rng.standard_normal((rows, cols)) * scale).float().numpy()
    )
    return spread


def ordinary(rng: np.random.Generator, rows: int, cols: int, tokens: int, has_bias: bool) -> Inputs:
    """Gaussian weights and activations; the bias is as large as the sums, so that its rounding shows."""
    bias = _bf16(rng.standard_normal(rows) * 0.02 * cols**0.5) if has_bias else None
    return Inputs(_bf16(rng.standard_normal((rows, cols)) * 0.02), _bf16(rng.standard_normal((tokens, cols))), bias)


def wide(rng: np.random.Generator, rows: int, cols: int, tokens: int, has_bias: bool) -> Inputs:
    """All magnitudes, denormals and sums that overflow among them."""

    def words(*shape: int) -> torch.Tensor:
        bits = rng.integers(0, 1 << 16, shape, np.uint16)
        bits = np.where(bits >> 7 & 255 == 255, bits & 0x807F, bits).astype(np.uint16)
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)

    return Inputs(words(rows, cols), words(tokens, cols), words(rows) if has_bias else None)


def tiny(rng: np.random.Generator, rows: int, cols: int, tokens: int, has_bias: bool) -> Inputs:
    """Products and sums around the smallest normal number, where it shows which steps flush denormals."""
    scale = 2.0**-63
    few = rng.random((rows, cols)) < 8 / cols  # of many products the sums would be too large
    bias = _bf16(rng.standard_normal(rows) * scale**2) if has_bias else None
    return Inputs(
        _bf16(np.where(few, _spread(rng, rows, cols) * scale, 0)), _bf16(_spread(rng, tokens, cols) * scale), bias
    )


def _bf16(values: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)


def _run(linear: Linear, inputs: Inputs, rows: int) -> torch.Tensor:
    """[tokens, rows]: what ``linear`` makes of the rows of the inputs, repeated to ``rows`` of them."""
    count = len(inputs.weight)
    bias = None if inputs.bias is None else inputs.bias.repeat(-(-rows // count))[:rows].contiguous()
    with repeated(inputs.weight, rows) as weight:
        return linear(inputs.x, weight, bias).reshape(len(inputs.x), rows).clone()


def _tells(probe: Inputs, expected: torch.Tensor, threads: int) -> bool:
    """Whether the inputs can tell orders apart: two that surely differ must differ in many outputs."""
    one, other = _dense(probe, Order("lanes"), threads), _dense(probe, Order("vdpbf16"), threads)
    return float((one != other).float().mean()) >= _TELLING and bool(torch.isfinite(expected).all())


def _agree(inputs: Inputs, expected: torch.Tensor, order: Order, threads: int) -> bool:
    """Whether our product from the compressed rows has the expected bits in every row and every repetition of it."""
    got, rows = _encoded(inputs, order, threads), expected.shape[1]
    wanted, count = expected.view(torch.int16), got.shape[1]
    got_bits, got_nan, nan = got.view(torch.int16), got.isnan(), expected.isnan()
    for at in range(0, rows, count):
        n = min(count, rows - at)
        part = slice(at, at + n)
        equal = (wanted[:, part] == got_bits[:, :n]) | (nan[:, part] & got_nan[:, :n])
        if not bool(equal.all()):
            return False
    return True


def _dense(inputs: Inputs, order: Order, threads: int = 1) -> torch.Tensor:
    out = torch.empty(len(inputs.x), len(inputs.weight), dtype=torch.bfloat16)
    products.linear_dense(
        _bytes(inputs.weight), _geometry(inputs.weight), _bytes(inputs.x), "BF16", _bytes(out), None, "BF16", order,
        threads,
    )  # fmt: skip
    return out


def _encoded(inputs: Inputs, order: Order, threads: int) -> torch.Tensor:
    weight, bias = inputs.weight, inputs.bias
    rows_per_table, parts = planes.encode(_bytes(weight), "BF16", False, *_geometry(weight), 0, threads)
    out = torch.empty(len(inputs.x), len(weight), dtype=torch.bfloat16)
    products.linear(
        parts, (*_geometry(weight), rows_per_table), _bytes(inputs.x), "BF16", _bytes(out),
        None if bias is None else _bytes(bias), "BF16", order, threads,
    )  # fmt: skip
    return out


def _geometry(weight: torch.Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _bytes(tensor: torch.Tensor) -> planes.Bytes:
    view: planes.Bytes = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return view
