"""A cache's tensors handed to kernels: the native ones on a CPU, CUDA's on a GPU and, in tests, in its emulation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from bitforbit.kv.state import KvState


def can_attend(state: KvState, q: Tensor, mask: Tensor | None) -> bool:
    """Whether a kernel takes this call's attention."""
    return False


def attend(
    state: KvState, q: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of one token per row, which is in the window."""
    raise NotImplementedError


def attend_before(
    state: KvState, q: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens before the call: output float32 [B, Hq, Lq, D], logarithm of the sum [B, Hq, Lq]."""
    raise NotImplementedError
