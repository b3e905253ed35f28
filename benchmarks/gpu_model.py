"""Claim: a model of Llama-3.1-8B's shape fits a third less GPU memory; exact mode gives the same bits, fused is faster.

Random weights (standard deviation 0.02), made and compressed on the GPU. BF16 and compressed live in one process: the
compressed model is a copy of the plain one whose weights are compressed. Decode steps run under a CUDA graph with a
static cache, all ways taking turns. Compared first: in mode exact the tokens that the graphs produce, and the logits of
every step and of the prefill, bit for bit; in mode fused the logits of a step and of the prefill, within a tolerance,
and the bits of a step that is run again. How many linears ran fused is part of the result.

    python -m benchmarks.gpu_model [--layers 32] [--dry-run] [--json FILE]
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks import gpu_common
from benchmarks.common import table
from benchmarks.gpu_common import Meter, Report, same_bits
from bitforbit.nn import compress_model, compressed_size, prove_orders, set_layout, set_mode
from bitforbit.ops import gpu, stats
from bitforbit.ops.gpu import Policy

STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Way:
    """How the compressed model runs."""

    mode: str
    policy: Policy

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model runs so."""
        set_mode(model, self.mode)
        with gpu.use_policy(self.policy):
            yield


WAYS = {
    "exact": Way("exact", Policy(prove_after=None)),
    "fused": Way("fused", Policy()),
    "exact, decoded": Way("exact", Policy(proven_orders=False)),
    "exact, decoded at use": Way("exact", Policy(proven_orders=False, ahead=0)),
    "exact, decoded first": Way("exact", Policy(proven_orders=False, product_first=False)),
}
"""Both modes, and exact mode by decoding alone, in several schedules."""


def way_of(name: str, models: dict[str, nn.Module]) -> contextlib.AbstractContextManager[None]:
    """The context of one of WAYS; none for BF16."""
    return contextlib.nullcontext() if name == "bf16" else WAYS[name].of(models["exact"])


FUSED_TOLERANCE = 0.1
"""Root mean square of the logits' differences from BF16's, relative to that of the logits: sums in another order."""
LAYERS = 32


@dataclass(frozen=True)
class Size:
    """Shape of the model and of the measurement."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    batches: tuple[int, ...]
    context: int
    """Tokens in the cache before the first measured step."""
    steps: int
    prefill: int
    rounds: int


FULL = Size(LAYERS, 4096, 14336, 32, 8, 128256, (1, 8, 32, 64), 128, 32, 2048, 5)
TINY = Size(1, 64, 96, 2, 1, 96, (2,), 3, 2, 5, 1)


def build(size: Size, device: torch.device) -> nn.Module:
    """A Llama with random weights, in GPU memory."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        vocab_size=size.vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=STANDARD_DEVIATION, generator=generator)
            else:
                parameter.fill_(1.0)
    return model.eval().requires_grad_(False)


def compressed_copy(model: nn.Module) -> nn.Module:
    """A model of its own that shares the plain one's weights until they are compressed."""
    twin = compress_model(copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}))
    return set_layout(twin, "tiles")


class Decoder:
    """Greedy steps of a model with a static cache. All inputs and outputs stay where they are, as graphs need it."""

    def __init__(self, model: nn.Module, batch: int, size: Size, device: torch.device) -> None:
        from transformers import StaticCache

        self.model = model
        self.size = size
        self.length = -(-(size.context + size.steps + 2) // 64) * 64  # a round number suits the attention kernels
        self.cache = StaticCache(config=model.config, max_cache_len=self.length)
        generator = torch.Generator(device).manual_seed(batch)
        self.prompt = torch.randint(size.vocabulary, (batch, size.context), device=device, generator=generator)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.history = torch.zeros(batch, self.length, dtype=torch.int64, device=device)
        self.columns = torch.arange(self.length, device=device)
        self.logits: torch.Tensor = torch.empty(0)

    @torch.no_grad()
    def start(self) -> None:
        """Fill the cache with the prompt; the first token comes from it."""
        output = self.model(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to the end of the prompt."""
        self.position.fill_(self.size.context)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.size.context)

    @torch.no_grad()
    def step(self) -> None:
        """One token more. Waits for nothing."""
        batch = self.tokens.shape[0]
        # Given whole, so that nothing about it is decided on the host.
        mask = (self.columns <= self.position)[None, None, None].expand(batch, 1, 1, self.length)
        output = self.model(
            self.tokens,
            attention_mask=mask,
            position_ids=self.position.expand(batch, 1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1]
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        self.history.index_copy_(1, self.position, self.tokens)
        self.position.add_(1)


class Replay:
    """A decoder's step, as a graph where there is a GPU."""

    def __init__(self, decoder: Decoder, meter: Meter) -> None:
        self.decoder = decoder
        decoder.start()
        self.first = decoder.tokens.clone()
        stats.reset()
        for _ in range(3):  # warm: libraries choose kernels, orders of weights and launches of several are learned
            decoder.step()
        self.ran = {way: count.weight_bytes for way, count in stats.snapshot().items()}
        self.graph = None
        if meter.measures:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                decoder.step()
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Back to the first token after the prompt."""
        self.decoder.rewind()
        self.decoder.tokens.copy_(self.first)

    def step(self) -> None:
        """One token more."""
        self.graph.replay() if self.graph is not None else self.decoder.step()


def decode(models: dict[str, nn.Module], batch: int, size: Size, meter: Meter) -> dict[str, Any]:
    """Steps of BF16 and of the compressed model in every way, in turns, after the gate."""
    plain = Replay(Decoder(models["bf16"], batch, size, meter.device), meter)
    replays = {"bf16": plain}
    begin = time.perf_counter()
    prove_orders(models["exact"], (batch,), (3,))
    seconds = time.perf_counter() - begin if meter.measures else None
    result: dict[str, Any] = {"batch": batch, "prove_seconds": seconds, "weights_share": {}}
    for name, way in WAYS.items():
        with way.of(models["exact"]):
            replays[name] = Replay(Decoder(models["exact"], batch, size, meter.device), meter)
            ran = replays[name].ran
            result["weights_share"][name] = {key: count / sum(ran.values()) for key, count in ran.items() if count}
            if way.mode == "fused" and not ran["fused"]:
                raise AssertionError(f"{name}: expected fused products, got {ran}")
            if way.mode == "exact":
                for i in range(size.steps):
                    plain.step()
                    replays[name].step()
                    same_bits(replays[name].decoder.logits, plain.decoder.logits, f"{name}: logits of step {i}")
                same_bits(replays[name].decoder.history, plain.decoder.history, f"{name}: tokens")
                plain.restart()
            else:
                result["fused_difference"] = check_fused(replays[name], plain, size)
    milliseconds: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(size.rounds if meter.measures else 0):
        for name, replay in replays.items():
            replay.restart()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(size.steps):
                replay.step()
            end.record()
            torch.cuda.synchronize()
            milliseconds[name].append(begin.elapsed_time(end) / size.steps)
    return {**result, "step_ms": {name: _median(values) for name, values in milliseconds.items()}}


def check_fused(replay: Replay, plain: Replay, size: Size) -> float:
    """The gate of mode fused: the same bits again, and the first step's logits near BF16's; returns how near."""
    replay.first.copy_(plain.first)
    runs = []
    for _ in range(2):
        replay.restart()
        logits = []
        for _ in range(size.steps):
            replay.step()
            logits.append(replay.decoder.logits.clone())
        runs.append(torch.stack(logits))
    same_bits(runs[1], runs[0], "fused: logits of a second run")
    plain.step()
    difference = near(runs[0][0], plain.decoder.logits, "fused: logits of the first step")
    plain.restart()
    return difference


def near(got: torch.Tensor, expected: torch.Tensor, what: str) -> float:
    """Root mean square of the differences by that of what is expected. Raises AssertionError if it is no near miss."""
    found = float((got.float() - expected.float()).norm() / expected.float().norm())
    if not found <= FUSED_TOLERANCE:
        raise AssertionError(f"{what}: expected a relative difference of at most {FUSED_TOLERANCE}, got {found}")
    return found


def prefill(models: dict[str, nn.Module], size: Size, meter: Meter) -> dict[str, Any]:
    """The first token of a long prompt, without graph."""
    generator = torch.Generator(meter.device).manual_seed(1)
    prompt = torch.randint(size.vocabulary, (1, size.prefill), device=meter.device, generator=generator)

    @torch.no_grad()
    def logits(name: str) -> torch.Tensor:
        return models["bf16" if name == "bf16" else "exact"](prompt, use_cache=False, logits_to_keep=1).logits

    names = ("bf16", *WAYS)
    for name in names:
        with way_of(name, models):
            if name == "fused":
                near(logits(name), logits("bf16"), "fused: logits of the prefill")
            else:
                same_bits(logits(name), logits("bf16"), f"{name}: logits of the prefill")
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(size.rounds if meter.measures else 0):
        for name in names:
            with way_of(name, models):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                logits(name)
                torch.cuda.synchronize()
                milliseconds[name].append(1000 * (time.perf_counter() - begin))
    return {"tokens": size.prefill, "ms": {name: _median(values) for name, values in milliseconds.items()}}


def memory(models: dict[str, nn.Module], size: Size, meter: Meter) -> dict[str, Any]:
    """Bytes of the weights, and the peak beyond them in a step of one token, without graph."""
    result = {}
    for name in ("bf16", "exact", "fused"):
        model = models["bf16" if name == "bf16" else "exact"]
        with way_of(name, models):
            weights, beyond = compressed_size(model).nbytes, None
            if meter.measures:
                gpu.clear()
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                decoder = Decoder(model, 1, replace(size, context=16, steps=2), meter.device)
                decoder.start()
                decoder.step()
                decoder.step()
                torch.cuda.synchronize()
                beyond = torch.cuda.max_memory_allocated() - before
                del decoder
        result[name] = {"weight_bytes": weights, "peak_beyond_weights": beyond}
    return result


def measure(size: Size, meter: Meter, report: Report) -> None:
    """All of it."""
    begin = time.perf_counter()
    plain = build(size, meter.device)
    built = time.perf_counter()
    models = {"bf16": plain, "exact": compressed_copy(plain)}
    if meter.measures:
        torch.cuda.synchronize()
    packed = time.perf_counter()
    report.put(
        layers=size.layers,
        context=size.context,
        build_seconds=built - begin if meter.measures else None,
        compress_seconds=packed - built if meter.measures else None,
        bits_per_weight=compressed_size(models["exact"]).bits_per_weight,
    )
    if (found := report.attempt("memory", lambda: memory(models, size, meter))) is not None:
        report.put(memory=found)
    steps: list[dict[str, Any]] = []
    for batch in size.batches:
        step = report.attempt(f"batch {batch}", lambda batch=batch: decode(models, batch, size, meter))
        steps += [step] if step else []
        report.put(decode=steps)
        gpu.clear()
    if (found := report.attempt("prefill", lambda: prefill(models, size, meter))) is not None:
        report.put(prefill=found)


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    names = ("bf16", *WAYS)
    rows = [
        [f"step, batch {d['batch']}, ms", *(gpu_common.cell(d["step_ms"][name], ".2f") for name in names)]
        for d in result.get("decode", ())
    ]
    if "prefill" in result:
        first = result["prefill"]
        rows.append([f"prefill {first['tokens']}, ms", *(gpu_common.cell(first["ms"][n], ".1f") for n in names)])
    for key, label in (("weight_bytes", "weights, GB"), ("peak_beyond_weights", "peak beyond, GB")):
        values = [result.get("memory", {}).get(name, {}).get(key) for name in ("bf16", "exact", "fused")]
        cells = [gpu_common.cell(None if value is None else value / 1e9, ".2f") for value in values]
        rows.append([label, *cells, *[""] * (len(names) - 3)])
    shares = [
        f"batch {d['batch']}, {name}: "
        + ", ".join(f"{share:.0%} of the weights {way}" for way, share in d["weights_share"][name].items())
        for d in result.get("decode", ())
        for name in ("exact", "fused")
    ]
    return "\n".join([table([f"{result['layers']} layers", *names], rows), *shares])


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def main(arguments: list[str]) -> int:
    """Measure and print."""
    options = gpu_common.parser(__doc__)
    options.add_argument("--layers", type=int, help="fewer than Llama-3.1-8B has")
    chosen = options.parse_args(arguments)
    size = TINY if chosen.dry_run else replace(FULL, layers=chosen.layers or LAYERS)
    report = Report(chosen.json)
    with gpu_common.meter(chosen.dry_run) as meter:
        measure(size, meter, report)
    print(show(report.result))
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
