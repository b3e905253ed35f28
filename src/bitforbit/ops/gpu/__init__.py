"""Compressed weights on NVIDIA GPUs: operators through CUDA kernels, decoding ahead, fused products, conversions.

Weights lie in the layouts ``tiles`` (BF16), ``df11`` (BF16 of DFloat11 checkpoints) or ``planes`` (any kind, as in
files). On CPU tensors the kernels run in an emulation, if a test has installed one (:func:`emulate`).
"""

from __future__ import annotations

from bitforbit.ops.gpu import df11, fused, planes, runtime, tiles
from bitforbit.ops.gpu.convert import df11_prepare, encode_planes, pack_tiles, planes_to_tiles, tiles_to_planes
from bitforbit.ops.gpu.order_probe import ALIGNMENT, Product
from bitforbit.ops.gpu.policy import Policy, scratch_bytes
from bitforbit.ops.gpu.proofs import alignment_of, prove
from bitforbit.ops.gpu.queues import emulate, has_queue, queue_for
from bitforbit.ops.gpu.runtime import check_status, current_policy, use_policy

__all__ = [
    "ALIGNMENT",
    "Policy",
    "Product",
    "alignment_of",
    "check_status",
    "clear",
    "current_policy",
    "df11_prepare",
    "emulate",
    "encode_planes",
    "has_queue",
    "pack_tiles",
    "planes_to_tiles",
    "prove",
    "queue_for",
    "register",
    "scratch_bytes",
    "tiles_to_planes",
    "use_policy",
]


def clear() -> None:
    """Forget the order of weights and, in this thread, free what was decoded ahead and the workspaces of products."""
    runtime.clear()
    fused.clear()


def register() -> None:
    """Register the operators' kernels; once per process."""
    tiles.register()
    df11.register()
    planes.register()
