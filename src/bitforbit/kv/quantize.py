"""Quantizes what leaves the exact window of a cache: by a kernel, or in torch where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bitforbit.errors import NonFiniteKeysError
from bitforbit.kv import kernels, pack
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
    if not kernels.can_flush(state):
        flush_torch(state, old_slots, new_slots)
        return
    groups = kernels.flush(state, old_slots, new_slots, pending)
    if groups:
        raise non_finite(state, groups)


def flush_torch(state: KvState, old_slots: int, new_slots: int) -> None:
    """The same in torch, a row and a segment at a time."""
    spec, sink = state.spec, state.spec.sink
    bad = 0
    for row in range(state.batch):
        old, new = state.tokens(row, old_slots), state.tokens(row, new_slots)
        for kind, write, quantized in (
            ("k", pack.write_keys, spec.keys_quantized),
            ("v", pack.write_values, spec.values_quantized),
        ):
            for segment, begin, end in pack.split(quantized(old), quantized(new)):
                first = sink + segment * SEGMENT_TOKENS
                x = state.exact(kind, row, first + begin, first + end)
                bad += int(write(state.segments[segment][row], state.layout, begin, x, state.params).sum())
    if bad:
        raise non_finite(state, bad)


def non_finite(state: KvState, groups: int) -> NonFiniteKeysError:
    """The error for so many groups with NaN or infinity: keys or values, as the parameters in memory say."""
    layout, where = state.layout, f"{state.name}: " if state.name else ""
    keys = slice(layout.key_params, layout.value_codes)
    in_keys = any(segment[..., keys].view(state.params).isnan().any() for segment in state.segments)
    return NonFiniteKeysError(
        f"{where}expected finite {'keys' if in_keys else 'values'} to quantize, got NaN or infinity in {groups} "
        f"groups; the model computes in {state.dtype}: try another dtype, or leave this layer's cache exact "
        "(residual=None)"
    )
