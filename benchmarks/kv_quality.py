"""Claim: a cache in 4 bits is within 1 % of the 16-bit perplexity, and better than QuantizedCache in as many bits.

Protocol: the first part of each row goes through the model at once, with exact attention, and is handed to every cache
alike. The rest follows, the right tokens whatever was predicted, one at a time (demo) or 16 at a time (smollm2, so
that the benchmark takes minutes: the up to 15 tokens before one in its call are exact, as in the window). So everything
that is scored attends to the cache. Rows, tokens and arithmetic are the same for all caches.

    python -m benchmarks.kv_quality                   both models, minutes
    python -m benchmarks.kv_quality --models demo     what needs no other package
    python -m benchmarks.kv_quality --smoke           seconds; no result file
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from benchmarks import kv_caches, kv_error
from benchmarks.common import save
from benchmarks.kv_caches import Variant, exact, kivi, quantized, rounded
from benchmarks.kv_models import DIGITS, Subject, Task, copying, lookup, missing, open_model, text

BLOCK = 64
"""Steps whose losses are averaged before the standard error is taken: neighbours are not independent."""


@dataclass(frozen=True)
class Size:
    """Rows of each task, tokens of the prefix, tokens after it, of which so many at a time."""

    rows: dict[str, int]
    prefix: int
    steps: int
    chunk: int


SIZES = {
    "demo": Size({"text": 8}, 512, 512, 1),
    "smollm2": Size({"text": 4, "copy": 2, "lookup": 3}, 1664, 256, 16),
}
SMOKE = {
    "demo": Size({"text": 2}, 192, 32, 1),
    "smollm2": Size({"text": 1, "copy": 1, "lookup": 1}, 512, 128, 16),
}
SINK = 4
"""Exact first tokens where there are any: their keys are outliers in many models, and spoil the group they are in."""
MAKERS = {"text": text, "copy": copying, "lookup": lookup}


def tasks(source: Subject, size: Size) -> list[Task]:
    """What a model is asked."""
    return [MAKERS[name](source, rows, size.prefix, size.steps) for name, rows in size.rows.items()]


def variants(model: str, everything: bool = False) -> list[Variant]:
    """The caches that are compared; the first is what the others are held against.

    HQQ searches for its scales, which takes minutes with the larger model: there only if ``everything`` is asked for.
    """
    ours = [kivi(8, 8, sink=SINK)]
    for k_bits, v_bits in ((4, 4), (4, 2), (2, 2)):
        ours += [kivi(k_bits, v_bits, sink=SINK), kivi(k_bits, v_bits)]
    ours += [kivi(4, 4, group=64, sink=SINK)]
    if model == "demo":
        ours += [kivi(4, 4, residual=32, sink=SINK), kivi(2, 2, residual=32, sink=SINK)]
    others = [
        quantized(backend, bits, group=group, best=best)
        for bits in (4, 2)
        for backend in kv_caches.PACKAGES
        if kv_caches.installed(backend) and (everything or (model, backend) != ("smollm2", "hqq"))
        for group, best in ((64, False), (32, True))  # the defaults, and what is best in as many bits as ours
        if bits == 4 or (backend, best) == ("quanto", True)
    ]
    return [exact(), exact("eager"), *ours, *others, rounded(4)]


@torch.inference_mode()
def prefill(model: Any, ids: Tensor) -> DynamicCache:
    """The exact keys and values of a prefix; a few rows at a time."""
    parts = []
    for rows in ids.split(4):
        parts.append(DynamicCache(config=model.config))
        model.model(rows, past_key_values=parts[-1], use_cache=True)
    whole = DynamicCache(config=model.config)
    for index in range(len(parts[0].layers)):
        keys, values = (torch.cat([getattr(part.layers[index], x) for part in parts]) for x in ("keys", "values"))
        whole.update(keys, values, index)
    return whole


@torch.inference_mode()
def steps(model: Any, cache: Any, ids: Tensor, size: Size) -> Iterator[Tensor]:
    """Logits [B, tokens, V] after each call; all tokens but the last are given to the model."""
    for begin in range(size.prefix, ids.shape[1] - 1, size.chunk):
        end = min(begin + size.chunk, ids.shape[1] - 1)
        yield model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits


@dataclass
class Scores:
    """Float [B, steps - 1]: loss in nats, KL to the reference, whether the top token is right, is the reference's."""

    loss: Tensor
    kl: Tensor
    right: Tensor
    agrees: Tensor


def score(logits: Iterator[Tensor], targets: Tensor, reference: list[Tensor] | None) -> tuple[Scores, list[Tensor]]:
    """Score calls against ``targets`` [B, steps - 1] and the reference's logits; also these logits."""
    kept, columns, done = [], [], 0
    for call, now in enumerate(logits):
        if reference is None:
            kept.append(now.clone())
        base = now if reference is None else reference[call]
        log_p, log_q = (x.float().log_softmax(-1) for x in (base, now))
        target = targets[:, done : done + now.shape[1]]
        done += now.shape[1]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
        top = now.argmax(-1)
        loss = -log_q.gather(2, target[..., None]).squeeze(2)
        columns.append(torch.stack([loss, kl, (top == target).float(), (top == base.argmax(-1)).float()]))
    return Scores(*torch.cat(columns, -1)), kept


def standard_error(difference: Tensor) -> float:
    """Of the mean of [B, steps], from means of blocks of steps."""
    usable = difference.shape[1] // BLOCK * BLOCK
    blocks = difference[:, :usable].unflatten(1, (-1, BLOCK)).mean(-1).flatten() if usable else difference.mean(1)
    return float(blocks.std() / math.sqrt(blocks.numel())) if blocks.numel() > 1 else float("nan")


def figures(task: Task, rows: slice, scores: Scores, base: Scores) -> dict[str, float]:
    """A task's part of the result file."""
    asked = task.asked[:, 1:]
    loss, base_loss, kl = scores.loss[rows], base.loss[rows], scores.kl[rows]
    values = {
        "loss": float(loss[asked].mean()),
        "perplexity": math.exp(float(loss[asked].mean())),
        "loss_difference": float((loss - base_loss)[asked].mean()),
        "kl": float(kl[asked].mean()),
        "kl_99": float(kl[asked].quantile(0.99)),
        "right": float(scores.right[rows][asked].mean()),
        "agrees": float(scores.agrees[rows][asked].mean()),
    }
    if task.name == "text":
        values["loss_difference_error"] = standard_error(loss - base_loss)
    if task.name == "lookup":
        values["asked"] = int(task.asked.sum()) // DIGITS
        values["found"] = float(scores.right[rows][asked].view(-1, DIGITS).min(-1).values.mean())
    return values


def attended_share(variant: Variant, size: Size) -> dict[str, float]:
    """Of what the steps attend to, the share that is quantized, keys and values; from the settings."""
    spec = variant.spec
    if spec is None:
        return {}
    lengths = range(size.prefix, size.prefix + size.steps - 1)
    return {
        kind: sum(count(length - (length - size.prefix) % size.chunk) / (length + 1) for length in lengths)
        / len(lengths)
        for kind, count in (("keys", spec.keys_quantized), ("values", spec.values_quantized))
    }


def measure(source: Subject, size: Size, chosen: Sequence[Variant]) -> dict[str, Any]:
    """All caches on all tasks of a model."""
    asked = tasks(source, size)
    ids = torch.cat([task.ids for task in asked])
    model, targets = source.model, ids[:, size.prefix + 1 :]
    kv_caches.use(model, chosen[0])
    given = prefill(model, ids[:, : size.prefix])
    elements = 2 * given.layers[0].keys.numel() // size.prefix * (ids.shape[1] - 1) * len(given.layers)
    base: Scores | None = None
    reference: list[Tensor] | None = None
    rows = []
    for variant in chosen:
        begin = time.perf_counter()
        cache = kv_caches.use(model, variant)
        kv_caches.hand_over(given, cache)
        scores, kept = score(steps(model, cache, ids, size), targets, reference)
        if base is None or reference is None:
            base, reference = scores, kept
        row: dict[str, Any] = {
            "name": variant.name,
            "family": variant.family,
            "settings": variant.settings,
            "bits": kv_caches.quantized_bits(variant, cache),
            "whole_bits": kv_caches.whole_bits(variant, cache, elements),
            "attended": attended_share(variant, size),
            "seconds": time.perf_counter() - begin,
        }
        first = 0
        for task in asked:
            row[task.name] = figures(task, slice(first, first + len(task.ids)), scores, base)
            first += len(task.ids)
        rows.append(row)
        print(_line(row), flush=True)
    return {
        "model": source.name, **vars(size), "variants": rows,
        "sensitivity": kv_error.sensitivity(model, given, ids[:, size.prefix]),
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['name']:28} {row['settings']:24} {row['bits']:5.2f} bits {row['seconds']:6.1f} s"]
    for task in ("text", "copy", "lookup"):
        if task in row:
            v = row[task]
            extra = f" found {v['found']:.3f}" if "found" in v else ""
            parts.append(f"{task} {v['perplexity']:.3f} ({100 * (math.exp(v['loss_difference']) - 1):+.2f} %)"
                         f" KL {v['kl']:.4f} agrees {v['agrees']:.3f}{extra}")  # fmt: skip
    return " | ".join(parts)


def run(
    names: Sequence[str] = ("demo", "smollm2"), smoke: bool = False, scale: int = 1, everything: bool = False
) -> dict[str, Any]:
    """Measure with so many times the usual rows, print and save; ``everything``: see :func:`variants`."""
    results = []
    for name in names:
        lacking = missing(name)
        if lacking:
            print(f"{name}: not measured ({lacking})")
            continue
        print(f"\n{name}", flush=True)
        size = (SMOKE if smoke else SIZES)[name]
        size = replace(size, rows={task: scale * rows for task, rows in size.rows.items()})
        results.append(measure(open_model(name), size, variants(name, everything)))
    values = {"threads": torch.get_num_threads(), "models": results}
    if not smoke:
        save("kv_quality", values)
    return values


def main(arguments: list[str]) -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--scale", type=int, default=1, help="times the usual rows, for smaller errors")
    parser.add_argument("--all", action="store_true", help="HQQ with the larger model too, which takes long")
    parser.add_argument("--smoke", action="store_true", help="a few rows and steps; nothing is saved")
    chosen = parser.parse_args(arguments)
    run(chosen.models, chosen.smoke, chosen.scale, chosen.all)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
