"""Quantizes what leaves the exact window of a cache: by a kernel, or in torch where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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
    if state.watch.earlier():
        raise non_finite(state, state.watch.wait())
    keys_leave = needed > state.spec.keys_quantized(old_slots)
    groups = kernels.flush(state, old_slots, new_slots, pending)
    groups = groups or state.watch.look(pending is not None or keys_leave)
    if groups:
        raise non_finite(state, groups)


class Watch:
    """Counts groups that are not finite on a device, and tells without waiting for it: a while later."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self._seen: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def look(self, worth: bool) -> int:
        """Fetch the count, if that is worth it; on a GPU :meth:`earlier` has it when it has arrived."""
        if not self.count.is_cuda:
            return int(self.count)
        if worth and self._event is None and not torch.cuda.is_current_stream_capturing():
            if self._seen is None:
                with torch.inference_mode(False):
                    self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            self._seen.copy_(self.count, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self.count.device))
        return 0

    def earlier(self) -> bool:
        """Whether a count that has arrived meanwhile is not zero."""
        if self._event is None or self._seen is None or not self._event.query():
            return False
        self._event = None
        return bool(self._seen.item())

    def wait(self) -> int:
        """The count, after all work of the device."""
        return int(self.count)

    def __getstate__(self) -> dict[str, Tensor | None]:
        """Copies and pickles have the count only."""
        return {"count": self.count, "_seen": None, "_event": None}


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
