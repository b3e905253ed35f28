"""Orders that were proven to be those of torch's own linear, on this machine, with these libraries.

In exact mode a product straight from the compressed weight is allowed only where its order has given torch's bits in
a probe (:mod:`bitforbit.ops.probe`). A probe takes some milliseconds, once per product; verdicts are kept in memory
and on disk (:mod:`bitforbit.ops.proven_cache`). ``BITFORBIT_PARANOID`` checks them again while running.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from bitforbit.cpu import isa
from bitforbit.cpu import linear as products
from bitforbit.cpu.linear import Order
from bitforbit.errors import OrderMismatchError, UsageError
from bitforbit.ops import probe, proven_cache
from bitforbit.ops.proven_cache import Key, Verdicts

MOST_TOKENS = 48
"""Above, decoding the weight and calling torch's product is as fast or nearly so (1.25 times as long at 48)."""

LEAST_ROWS, LEAST_COLS = 16, 64
"""Below, there is nothing to gain."""

FAST_ON = frozenset({"avx2", "avx512", "avx512_vbmi2", "avx512_bf16"})
"""Instruction sets whose products of these families beat decoding and torch's product."""


@dataclass
class _State:
    verdicts: Verdicts
    loaded: bool
    uses: Counter[Key]


_state = _State({}, False, Counter())
_lock = threading.RLock()


def lookup(rows: int, cols: int, tokens: int, threads: int, has_bias: bool, dtype: torch.dtype) -> Order | None:
    """The order of ``functional.linear(x, weight, bias)`` for x ``[tokens, cols]``, weight ``[rows, cols]``, or None.

    For dense inputs of that dtype, torch computing on ``threads``. Runs the probe where nobody did before.
    """
    if dtype is not torch.bfloat16 or not 0 < tokens <= MOST_TOKENS or rows < LEAST_ROWS or cols < LEAST_COLS:
        return None
    key = _key(rows, cols, tokens, threads, has_bias)
    try:
        return _state.verdicts[key]
    except KeyError:
        return _prove(key, rows, cols, tokens, threads, has_bias)


def forget(rows: int, cols: int, tokens: int, threads: int, has_bias: bool) -> None:
    """Withdraw a verdict: this product counts as not proven in this process, and is probed again by the next one."""
    key = _key(rows, cols, tokens, threads, has_bias)
    with _lock:
        _state.verdicts[key] = None
        proven_cache.store(proven_cache.path(), {}, forget=key)


def clear() -> None:
    """Forget what is in memory, as in a new process; the file stays."""
    with _lock:
        _state.verdicts, _state.loaded, _state.uses = {}, False, Counter()


def recheck(
    rows: int, cols: int, threads: int, has_bias: bool, got: torch.Tensor, decoded: Callable[[], torch.Tensor]
) -> None:
    """Where ``BITFORBIT_PARANOID`` asks for it, compare a proven product with the decoded one, bit for bit.

    ``got`` is ``[..., rows]``, ``decoded`` computes the same with torch. Raises OrderMismatchError, and withdraws the
    proof, if they differ.
    """
    tokens = got.numel() // rows
    if not is_due(_key(rows, cols, tokens, threads, has_bias)):
        return
    expected = decoded()
    differing = int((got.view(torch.int16) != expected.view(torch.int16)).sum())
    if differing:
        forget(rows, cols, tokens, threads, has_bias)
        raise OrderMismatchError(
            f"expected the product of {tokens} x {cols} activations with a {rows} x {cols} weight on {threads} threads "
            f"to have torch's bits, as proven before, got {differing} of {got.numel()} outputs with others; the proof "
            "is withdrawn: run again, and please report this with the output of `bitforbit info`"
        )


def settled(out: torch.Tensor) -> bool:
    """Whether a proven product stands: with NaN among the outputs, which NaN it is has not been proven."""
    return not bool(out.isnan().any())


def _key(rows: int, cols: int, tokens: int, threads: int, has_bias: bool) -> Key:
    return rows, cols, tokens, threads, has_bias, isa.active(), torch._C._get_mkldnn_enabled()


def _prove(key: Key, rows: int, cols: int, tokens: int, threads: int, has_bias: bool) -> Order | None:
    with _lock:
        if not _state.loaded:
            _state.verdicts = {**proven_cache.load(proven_cache.path()), **_state.verdicts}
            _state.loaded = True
        if key not in _state.verdicts:
            families = [family for family in probe.UNITS if products.implementation(family) in FAST_ON]
            order = None
            if families:
                order = _probe(rows, cols, tokens, threads, has_bias, families)
                proven_cache.store(proven_cache.path(), {key: order})
            _state.verdicts[key] = order
        return _state.verdicts[key]


def _probe(rows: int, cols: int, tokens: int, threads: int, has_bias: bool, families: list[str]) -> Order | None:
    before = torch.get_num_threads()
    try:
        if before != threads:
            torch.set_num_threads(threads)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return probe.find_order(functional.linear, rows, cols, tokens, threads, has_bias, families)
    finally:
        if before != threads:
            torch.set_num_threads(before)


def is_due(key: Key) -> bool:
    """Whether BITFORBIT_PARANOID wants this use checked: a share of all uses, or the first so many of every product."""
    text = os.environ.get("BITFORBIT_PARANOID", "")
    if not text:
        return False
    try:
        wanted = float(text)
    except ValueError:
        wanted = -1.0
    if not 0 <= wanted < math.inf:
        raise UsageError(
            f"expected BITFORBIT_PARANOID to be a share from 0 to 1 or a number of checks per product, got {text!r}"
        )
    with _lock:
        _state.uses[key] += 1
        uses = _state.uses[key]
    return math.floor(uses * wanted) > math.floor((uses - 1) * wanted) if wanted <= 1 else uses <= wanted
