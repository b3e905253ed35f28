"""How decoding and products are scheduled: data, for measurements to choose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Results never depend on it, only time and memory do."""

    ahead: int = 1
    """Weights that are decoded beside the product of the current one; 0: each is decoded right before its product."""
    least_tokens: int = 1
    """With fewer tokens nothing is decoded ahead: small products may gain more from a weight still in the L2 cache."""
    product_first: bool = True
    """Whether the product is enqueued before the decoding beside it."""
    join_at_use: bool = True
    """Whether the next weight's decoding may go on beside what follows the product, until that weight is used. Within
    a graph capture the operator always waits for it, because a capture must not end with open side work."""
    scratch_bytes: int | None = None
    """Upper limit of the memory of decoded weights that exist at a time; the current one is decoded in any case. None:
    what ``ahead`` brings about."""
    slice_bytes: int | None = None
    """Weights that decode to more are multiplied in slices of about so many bytes, where that has been proven to keep
    torch's bits (:mod:`bitforbit.ops.gpu.slices`). None: never."""
    grouped: bool = True
    """Whether linears that were seen to share their input, as q, k and v do, are multiplied in one launch in mode
    ``"fused"``."""
    grouped_in_inference_mode: bool = False
    """Also under ``torch.inference_mode``, where torch does not count changes of tensors: right as long as nobody
    changes a layer's input in place between the products that share it. ``torch.no_grad`` needs no such trust."""
    proven_orders: bool = True
    """Whether products of up to 64 tokens in mode ``"exact"`` run straight from tiles where their order of sums was
    proven to be torch's own (:mod:`bitforbit.ops.gpu.proofs`)."""
    prove_after: int | None = 32
    """A product (these sizes, this number of tokens) is probed when it is used for so many times, once, unless the
    verdict is on disk. None: never; then ``ops.gpu.prove`` is the only way."""


def scratch_bytes(sizes: Iterable[int], policy: Policy | None = None) -> int:
    """Most memory that exact mode takes for decoded weights.

    ``sizes`` are the bytes of the decoded weights of linears in the order in which the model uses them; weights decoded
    ahead exist beside the current one, so with the default policy it is the largest sum of two neighbours.
    """
    policy = policy or Policy()
    weights = list(sizes)
    window = policy.ahead + 1
    most = max((sum(weights[i : i + window]) for i in range(len(weights))), default=0)
    if policy.scratch_bytes is None:
        return most
    return max(min(most, policy.scratch_bytes), max(weights, default=0))
