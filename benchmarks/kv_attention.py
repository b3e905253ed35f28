"""Decoding attention over a quantized cache against torch's over the BF16 cache: one token, Llama-3.1-8B's heads.

32 query heads share 8 key-value heads of 128 channels; groups of 32, an exact window of 128. torch's ways: ``gqa``
(scaled_dot_product_attention with enable_gqa), ``repeat`` (keys and values repeated first, as transformers does), and
``grouped`` (the query heads of a key-value head as rows of one query, which reads the cache once: what a user could
write by hand). Before anything is timed, torch's ways must be near FP64, and the kernels near the portable one on the
same packed cache, which the tests hold against FP64; the error that quantization itself makes is reported. Copies of a
cache take turns, so that no cache of the CPU holds them; the ways take turns too, and medians count.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import paired, save, table
from bitforbit import cpu
from bitforbit.cpu import kv, threads
from bitforbit.kv.layout import SEGMENT_TOKENS, KvLayout
from bitforbit.kv.spec import KiviSpec

if TYPE_CHECKING:
    import torch

QUERY_HEADS, HEADS, HEAD_DIM = 32, 8, 128
CONTEXTS = (1024, 8192, 32768)
BITS = ((8, 8), (4, 4), (4, 2), (2, 2))
BYTES_AT_LEAST = 96 << 20
"""Size of all copies of one BF16 cache: more than the last level of cache."""
ROUNDS = 9


@dataclass
class Packed:
    """A quantized cache of one row."""

    spec: KiviSpec
    segments: list[torch.Tensor]
    window_k: torch.Tensor
    window_v: torch.Tensor
    start: torch.Tensor
    tokens: int

    @property
    def nbytes(self) -> int:
        """Of the segments' used part and of the windows."""
        layout = KvLayout(self.spec, HEAD_DIM)
        packed = HEADS * layout.record_bytes * self.tokens // SEGMENT_TOKENS
        return packed + 2 * self.window_k.nbytes

    def call(self, slots: int) -> kv.KvCall:
        """For the kernels."""
        s = self.spec
        assert s.residual is not None
        return kv.KvCall(
            1, HEADS, HEAD_DIM, s.k_bits, s.v_bits, s.group, s.value_group, s.residual, 0, s.residual + 1, "BF16",
            [x.data_ptr() for x in self.segments], self.window_k.data_ptr(), self.window_v.data_ptr(), 0, 0,
            self.start.data_ptr(), slots,
        )  # fmt: skip


def pack(spec: KiviSpec, k: torch.Tensor, v: torch.Tensor) -> Packed:
    """Quantize keys and values [1, HEADS, T, HEAD_DIM]; the last token is in the window as of the current call."""
    import torch

    tokens = k.shape[2] - 1
    assert spec.residual is not None
    record = KvLayout(spec, HEAD_DIM).record_bytes
    segments = [
        torch.zeros(1, HEADS, record, dtype=torch.uint8)
        for _ in range(-(-spec.keys_quantized(tokens) // SEGMENT_TOKENS))
    ]
    window = torch.zeros(2, 1, HEADS, spec.residual + 1, HEAD_DIM, dtype=torch.bfloat16)
    packed = Packed(spec, segments, window[0], window[1], torch.zeros(1, dtype=torch.int32), tokens)
    strides = (0, k.stride(1), k.stride(2), 0, v.stride(1), v.stride(2))
    kv.flush(packed.call(0), tokens, k.data_ptr(), v.data_ptr(), strides, cpu.default_threads())
    for slot in range(tokens - spec.residual, tokens + 1):
        packed.window_k[:, :, slot % (spec.residual + 1)] = k[:, :, slot]
        packed.window_v[:, :, slot % (spec.residual + 1)] = v[:, :, slot]
    return packed


def ours(packed: Packed, q: torch.Tensor, workers: int, isa: str = "") -> torch.Tensor:
    """Attention of q [1, QUERY_HEADS, 1, HEAD_DIM]."""
    import torch

    out = torch.empty_like(q)
    with cpu.force(isa or cpu.active()):
        kv.attend(
            packed.call(packed.tokens), packed.tokens + 1, q.data_ptr(), (0, HEAD_DIM, 0), QUERY_HEADS // HEADS, 1,
            HEAD_DIM**-0.5, 0.0, 0, 0, (0, 0, 0), out.data_ptr(), False, 0, workers,
        )  # fmt: skip
    return out


def gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch with enable_gqa."""
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeat(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch after repeat_kv."""
    import torch

    def repeated(x: torch.Tensor) -> torch.Tensor:
        shape = (1, HEADS, QUERY_HEADS // HEADS, x.shape[2], HEAD_DIM)
        return x[:, :, None].expand(shape).reshape(1, QUERY_HEADS, x.shape[2], HEAD_DIM)

    return torch.nn.functional.scaled_dot_product_attention(q, repeated(k), repeated(v))


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch with the query heads of a key-value head as query rows."""
    import torch

    rows = q.view(1, HEADS, QUERY_HEADS // HEADS, HEAD_DIM)
    return torch.nn.functional.scaled_dot_product_attention(rows, k, v).view(q.shape)


TORCH = {"gqa": gqa, "repeat": repeat, "grouped": grouped}


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FP64."""
    return grouped(q.double(), k.double(), v.double())


def name_of(bits: tuple[int, int]) -> str:
    """k4v2."""
    return f"k{bits[0]}v{bits[1]}"


@dataclass
class Inputs:
    """Copies of one cache in BF16 and packed; which is next."""

    q: torch.Tensor
    plain: list[tuple[torch.Tensor, torch.Tensor]]
    packed: dict[str, list[Packed]]


def make_inputs(context: int) -> Inputs:
    """Gaussian keys and values; channels of the keys differ in size and mean, as they do in models."""
    import torch

    generator = torch.Generator().manual_seed(context)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    copies = max(1, -(-BYTES_AT_LEAST // (4 * HEADS * context * HEAD_DIM)))
    k = gaussian(1, HEADS, context, HEAD_DIM) * gaussian(HEAD_DIM).exp() + gaussian(HEAD_DIM)
    v = gaussian(1, HEADS, context, HEAD_DIM)
    plain = [(k.bfloat16(), v.bfloat16()) for _ in range(copies)]
    packed = {name_of(bits): [pack(KiviSpec(*bits), *plain[0]) for _ in range(copies)] for bits in BITS}
    return Inputs((gaussian(1, QUERY_HEADS, 1, HEAD_DIM) / 4).bfloat16(), plain, packed)


def check(inputs: Inputs, workers: int) -> dict[str, float]:
    """The gate; errors against FP64 on the BF16 cache, relative to the largest output."""
    expected = truth(inputs.q, *inputs.plain[0])

    def error(got: torch.Tensor, of: torch.Tensor) -> float:
        return float((got.double() - of.double()).abs().max() / expected.abs().max())

    errors = {name: error(way(inputs.q, *inputs.plain[0]), expected) for name, way in TORCH.items()}
    for name, packed in inputs.packed.items():
        got = ours(packed[0], inputs.q, workers)
        errors[name] = error(got, expected)
        if error(got, ours(packed[0], inputs.q, workers, "scalar")) > 0.02:
            raise AssertionError(f"{name}: {kv.implementation('BF16')} differs from the portable kernel")
    if max(errors[name] for name in TORCH) > 0.05:
        raise AssertionError(f"torch's ways are far from FP64: {errors}")
    return errors


def every_copy(count: int, body: Callable[[int], object]) -> Callable[[], object]:
    """A function that runs ``body`` for every copy."""

    def run() -> None:
        for i in range(count):
            body(i)

    return run


def measure(context: int, workers: int, inputs: Inputs) -> dict[str, Any]:
    """Milliseconds of one attention for every way, with ratios to the faster one of gqa and repeat."""
    import torch

    torch.set_num_threads(workers)
    errors, copies, q = check(inputs, workers), len(inputs.plain), inputs.q
    ways: dict[str, Callable[[], object]] = {
        name: every_copy(copies, lambda i, way=way: way(q, *inputs.plain[i])) for name, way in TORCH.items()
    }
    for name, packed in inputs.packed.items():
        ways[name] = every_copy(copies, lambda i, packed=packed: ours(packed[i], q, workers))
    times = {name: seconds / copies for name, seconds in paired(ways, ROUNDS).items()}
    fastest, by_hand = min(times["gqa"], times["repeat"]), times["grouped"]
    plain_bytes = 4 * HEADS * context * HEAD_DIM
    return {
        "context": context,
        "threads": workers,
        "bytes": {"BF16": plain_bytes} | {name: packed[0].nbytes for name, packed in inputs.packed.items()},
        "milliseconds": {name: round(1e3 * seconds, 4) for name, seconds in times.items()},
        "bf16_gb_per_s": {name: round(plain_bytes / seconds / 1e9, 2) for name, seconds in times.items()},
        "speedup": {name: round(fastest / times[name], 2) for name in inputs.packed},
        "speedup_over_grouped": {name: round(by_hand / times[name], 2) for name in inputs.packed},
        "error": {name: round(value, 6) for name, value in errors.items()},
    }


def run() -> dict[str, Any]:
    """Measure, print and save."""
    import torch

    threads.share_openmp_threads(str(Path(torch.__file__).parent))
    results = []
    load = os.getloadavg()[0]
    with torch.inference_mode():
        for context in CONTEXTS:
            inputs = make_inputs(context)
            for workers in sorted({1, cpu.default_threads()}):
                results.append(measure(context, workers, inputs))
                print(results[-1], flush=True)
    names = [name_of(bits) for bits in BITS]
    rows = []
    for r in results:
        times, ratios, by_hand = r["milliseconds"], r["speedup"], r["speedup_over_grouped"]
        cells = [f"{times[name]:.2f} ({ratios[name]:.1f}x, {by_hand[name]:.1f}x)" for name in names]
        rows.append([str(r["context"]), str(r["threads"]), *(f"{times[name]:.2f}" for name in TORCH), *cells])
    print("\nMilliseconds of one attention (in brackets: faster than torch's gqa or repeat, than grouped)\n")
    print(table(["context", "threads", *TORCH, *names], rows))
    summary = {"implementation": kv.implementation("BF16"), "load_before": round(load, 2), "results": results}
    save("kv_attention", summary)
    return summary


if __name__ == "__main__":
    run()
