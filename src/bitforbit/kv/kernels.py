"""A cache's tensors handed to kernels: the native ones on a CPU, CUDA's on a GPU (in tests, in the emulation).

Where there is none the answer is no, and torch does it: other devices, a GPU without what compiles kernels.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitforbit.cpu import kv as cpu_kv
from bitforbit.cuda import kv as cuda_kv
from bitforbit.cuda.kv.call import ALIGNMENT, LARGEST_GRID, LARGEST_HEAD
from bitforbit.errors import GpuUnavailableError
from bitforbit.ops import gpu

if TYPE_CHECKING:
    from bitforbit.kv.state import KvState

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_log = logging.getLogger(__name__)


def can_flush(state: KvState) -> bool:
    """Whether there is a kernel that packs."""
    return _on_gpu(state) or state.device.type == "cpu"


def flush(state: KvState, old_slots: int, new_slots: int, pending: tuple[Tensor, Tensor] | None) -> int:
    """Pack what leaves the window; see ``quantize.flush_tokens``. The number of groups that are not finite.

    On a GPU this only enqueues, adds that number to ``state.watch`` and returns 0.
    """
    k, v = (None, None) if pending is None else (_aligned(x) for x in pending)
    strides = (0, 0, 0, 0, 0, 0) if k is None or v is None else (*_strides(k), *_strides(v))
    if _on_gpu(state):
        call = cuda_kv.KvCall(**_fields(state, old_slots), segments=_table(state))
        bad = state.watch.count.data_ptr()
        cuda_kv.flush(gpu.queue_for(state.device), call, new_slots, bad, _address(k), _address(v), strides)
        return 0
    return cpu_kv.flush(
        cpu_kv.KvCall(**_fields(state, old_slots), segments=_segments(state)), new_slots - old_slots,
        _address(k), _address(v), strides, torch.get_num_threads(),
    )  # fmt: skip


def can_attend(state: KvState, q: Tensor, mask: Tensor | None) -> bool:
    """Whether a kernel takes this call's attention."""
    if state.spec.residual is None or state.capacity == 0 or q.dtype is not state.dtype:
        return False
    if mask is not None and mask.dtype is not torch.bool:
        return False
    if _on_gpu(state):
        return state.dtype is torch.bfloat16
    return bool(state.device.type == "cpu")


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
    q = _aligned(q.detach())
    mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
    sinks = None if sinks is None else sinks.detach().to(device=q.device, dtype=torch.float32).contiguous()
    queries = (q.shape[1] // state.heads, q.shape[2])
    arguments = (
        visible, q.data_ptr(), _strides(q), *queries, scaling, softcap or 0.0, _address(sinks), _address(mask),
        _mask_strides(mask), out.data_ptr(), out.dtype is torch.float32, _address(lse),
    )  # fmt: skip
    fields = _fields(state, state.flushed)
    if not _on_gpu(state):
        call = cpu_kv.KvCall(**fields, segments=_segments(state))
        cpu_kv.attend(call, *arguments, torch.get_num_threads())
        return
    gpu_call = cuda_kv.KvCall(**fields, segments=_table(state))
    size = cuda_kv.workspace_bytes(gpu_call, visible, *queries)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    cuda_kv.attend(gpu.queue_for(state.device), gpu_call, *arguments, workspace.data_ptr())


def _on_gpu(state: KvState) -> bool:
    """Whether CUDA's kernels take a cache."""
    fits = state.head_dim <= LARGEST_HEAD and state.batch * state.heads <= LARGEST_GRID
    return fits and gpu.has_queue(state.device) and (state.device.type == "cpu" or _usable(state.device))


@lru_cache
def _usable(device: torch.device) -> bool:
    try:
        gpu.queue_for(device)
    except GpuUnavailableError as error:
        _log.warning("quantized KV caches on %s are read by torch, which is slow: %s", device, error)
        return False
    return True


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


def _segments(state: KvState) -> list[int]:
    return [segment.data_ptr() for segment in state.segments]


def _table(state: KvState) -> int:
    """Address of the segments' addresses in device memory, uploaded when they are others than before.

    The table stays where it is while it has room, so that captured graphs find new segments too.
    """
    segments = _segments(state)
    if state.table is None or state.table_of != segments:
        with torch.inference_mode(False):
            if state.table is None or len(state.table) < len(segments):
                state.table = torch.zeros(max(256, 2 * len(segments)), dtype=torch.int64, device=state.device)
            state.table[: len(segments)] = torch.tensor(segments, dtype=torch.int64)
        state.table_of = segments
    return int(state.table.data_ptr())


def _aligned(x: Tensor) -> Tensor:
    """With channels side by side and tokens on 16 bytes, as kernels read them; new tokens only, so a copy is small."""
    starts = (x.data_ptr(), *(stride * x.element_size() for stride in _strides(x)))
    if x.stride(-1) == 1 and not any(start % ALIGNMENT for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """In bytes; 0 where one mask is for all heads."""
    if mask is None:
        return 0, 0, 0
    batch, head, query = _strides(mask)
    return batch, head if mask.shape[1] > 1 else 0, query


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
