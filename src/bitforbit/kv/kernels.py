"""A cache's tensors handed to kernels: the native ones on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitforbit.cpu import kv as cpu_kv

if TYPE_CHECKING:
    from bitforbit.kv.state import KvState

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def can_flush(state: KvState) -> bool:
    """Whether there is a kernel that packs."""
    return bool(state.device.type == "cpu")


def flush(state: KvState, old_slots: int, new_slots: int, pending: tuple[Tensor, Tensor] | None) -> int:
    """Pack what leaves the window; the number of groups that are not finite. See ``quantize.flush_tokens``."""
    call = cpu_kv.KvCall(**_fields(state, old_slots), segments=[segment.data_ptr() for segment in state.segments])
    if pending is None:
        return cpu_kv.flush(call, new_slots - old_slots, 0, 0, (0,) * 6, torch.get_num_threads())
    k, v = (_dense(x) for x in pending)
    strides = (*_strides(k), *_strides(v))
    return cpu_kv.flush(call, new_slots - old_slots, k.data_ptr(), v.data_ptr(), strides, torch.get_num_threads())


def can_attend(state: KvState, q: Tensor, mask: Tensor | None) -> bool:
    """Whether a kernel takes this call's attention."""
    plain_mask = mask is None or mask.dtype is torch.bool
    return bool(can_flush(state) and q.dtype is state.dtype and plain_mask and state.capacity > 0)


def attend(
    state: KvState, q: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of one token per row, which is in the window."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _attend(state, state.slots, q, mask, scaling, softcap, sinks, out, None)
    return out


def attend_before(
    state: KvState, q: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens before the call: output float32 [B, Hq, Lq, D], logarithm of the sum [B, Hq, Lq]."""
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _attend(state, state.flushed, q, mask, scaling, softcap, None, out, lse)
    return out, lse


def _attend(
    state: KvState, visible: int, q: Tensor, mask: Tensor | None, scaling: float, softcap: float | None,
    sinks: Tensor | None, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    q = _dense(q.detach())
    mask = None if mask is None else _dense(mask)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    call = cpu_kv.KvCall(**_fields(state, state.flushed), segments=[segment.data_ptr() for segment in state.segments])
    cpu_kv.attend(
        call, visible, q.data_ptr(), _strides(q), q.shape[1] // state.heads, q.shape[2], scaling, softcap or 0.0,
        _address(sinks), _address(mask), (0, 0, 0) if mask is None else _mask_strides(mask), out.data_ptr(),
        out.dtype is torch.float32, _address(lse), torch.get_num_threads(),
    )  # fmt: skip


def _fields(state: KvState, slots: int) -> dict[str, Any]:
    spec = state.spec
    return {
        "batch": state.batch, "heads": state.heads, "head_dim": state.head_dim, "k_bits": spec.k_bits,
        "v_bits": spec.v_bits, "group": spec.group, "v_group": spec.value_group, "residual": spec.residual or 0,
        "sink": spec.sink, "capacity": state.capacity, "dtype": NAMES[state.dtype],
        "window_k": state.window_k.data_ptr(), "window_v": state.window_v.data_ptr(),
        "sink_k": state.sink_k.data_ptr(), "sink_v": state.sink_v.data_ptr(), "start": state.start.data_ptr(),
        "tokens": slots,
    }  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """With channels (or slots) side by side, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _mask_strides(mask: Tensor) -> tuple[int, int, int]:
    """In bytes; 0 where one mask is for all rows or heads."""
    batch, head, query = _strides(mask)
    return batch, head if mask.shape[1] > 1 else 0, query


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
