"""Tokens per second from bytes moved: every weight and the whole cache once per step, over the data sheet's bandwidth.

Estimates, and upper ones: nothing reaches a data sheet's bandwidth, and arithmetic, launches, what GPUs send each other
and what does not overlap are left out. Good for order: which of two settings is faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bitforbit.iomodel.traffic import StepTraffic, predict_seconds
from bitforbit.planner.gpus import Gpu
from bitforbit.planner.memory import Load, Stage


def step_traffic(stage: Stage, load: Load) -> StepTraffic:
    """Bytes that a step moves on one GPU of a group, with the whole context in the cache."""
    storage, d, batch = stage.storage, stage.shape.dimensions, load.batch
    matrices = [m for layer in stage.layers for m in layer.matrices]
    matrices += [stage.shape.output] if stage.last else []  # an embedding reads a row per token
    weights = 0.0
    for matrix, count in Counter(matrices).items():
        # A decoded weight is read once compressed, written, and read once more.
        decoded = 2 * matrix.elements * storage.item if storage.decodes(batch) else 0
        weights += count * stage.part(matrix) * matrix.read(batch) * (storage.nbytes(matrix) + decoded)
    per_layer = 4 * d.hidden + (stage.shape.attention_width + stage.shape.mlp_width) // stage.split.tensor
    activations = batch * stage.item * (len(stage.layers) * per_layer + (d.vocab if stage.last else 0))
    return StepTraffic(
        weights=weights,
        kv_read=sum(count * cache.read(load.context, batch) for cache, count in stage.caches.items()),
        kv_written=float(sum(count * cache.token_bytes * batch for cache, count in stage.caches.items())),
        activations=float(activations),
    )


def tokens_per_second(stages: Sequence[Stage], load: Load, gpu: Gpu) -> float | None:
    """Of all sequences together, groups of GPUs working one after the other; None if the bandwidth is unknown."""
    if gpu.bandwidth is None:
        return None
    seconds = sum(predict_seconds(step_traffic(stage, load), gpu.machine) for stage in stages)
    return load.batch / seconds if seconds else None
