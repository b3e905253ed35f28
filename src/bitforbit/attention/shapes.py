"""Which queries, keys and values fit together."""

from __future__ import annotations

from torch import Tensor

from bitforbit.errors import AttentionError


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise AttentionError unless q is ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]`` and v ``[B, Hkv, Lk, Dv]``.

    Hkv divides Hq.
    """
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0]
    if not fits or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise AttentionError(
            "expected q [B, Hq, Lq, D], k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv] with Hq a multiple of Hkv, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
