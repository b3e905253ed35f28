"""Quantizes what leaves the exact window of a cache: by a kernel, or in torch where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bitforbit.errors import NonFiniteKeysError
from bitforbit.kv import pack
from bitforbit.kv.layout import SEGMENT_TOKENS

if TYPE_CHECKING:
    from bitforbit.kv.state import KvState


def flush_tokens(state: KvState, old_slots: int, new_slots: int, pending: tuple[Tensor, Tensor] | None) -> None:
    """Quantize what slots ``old_slots`` to ``new_slots`` push out of the window; ``pending`` are these slots' tokens.

    Without ``pending`` they are in the window. Raises NonFiniteKeysError for NaN and infinity.
    """
    needed = state.spec.keys_quantized(new_slots)
    if state.spec.residual is None or new_slots < state.spec.sink + state.spec.residual:
        return
    state.room_for(needed)
    flush_torch(state, old_slots, new_slots)


def flush_torch(state: KvState, old_slots: int, new_slots: int) -> None:
    """The same in torch, a row and a segment at a time."""
    spec, sink = state.spec, state.spec.sink
    bad = {"keys": 0, "values": 0}
    for row in range(state.batch):
        old, new = state.tokens(row, old_slots), state.tokens(row, new_slots)
        for segment, begin, end in pack.split(spec.keys_quantized(old), spec.keys_quantized(new)):
            first = sink + segment * SEGMENT_TOKENS
            x = state.exact("k", row, first + begin, first + end)
            found = pack.write_keys(state.segments[segment][row], state.layout, begin, x, state.params)
            bad["keys"] += int(found.sum())
        for segment, begin, end in pack.split(spec.values_quantized(old), spec.values_quantized(new)):
            first = sink + segment * SEGMENT_TOKENS
            x = state.exact("v", row, first + begin, first + end)
            found = pack.write_values(state.segments[segment][row], state.layout, begin, x, state.params)
            bad["values"] += int(found.sum())
    for what, groups in bad.items():
        if groups:
            raise non_finite(state, what, groups)


def non_finite(state: KvState, what: str, groups: int) -> NonFiniteKeysError:
    """The error for groups with NaN or infinity."""
    where = f"{state.name}: " if state.name else ""
    return NonFiniteKeysError(
        f"{where}expected finite {what} to quantize, got NaN or infinity in {groups} groups; the model computes them "
        f"in {state.dtype}: try another dtype, or a cache without quantization for this layer (residual=None)"
    )
