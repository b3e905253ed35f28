"""Render the tables of README and guides from ``benchmarks/results``: ``python -m benchmarks.report [--write]``.

A page holds each table between ``<!-- benchmark: NAME -->`` and ``<!-- end -->``; --write replaces what is between
them. A benchmark without a result file renders as "not measured".
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import attention_report, kv_report, plots
from benchmarks.common import RESULTS, ROOT, table

Result = dict[str, Any]


def where(result: Result) -> str:
    """One line that names machine, versions and commit."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if name != "bitforbit")
    return (
        f"{m['cpu']}, {m['cpus']} CPUs, {' / '.join(m['instruction_sets'])}; Python {m['python']}, {versions}; "
        f"commit {m['commit']}, {m['date']} (`benchmarks/results/{result['benchmark']}.json`)"
    )


def codec(result: Result) -> str:
    """Speeds on the first source, sizes on all of them."""
    first, *_ = sources = result["sources"]
    peer, copy = first["codecs"]["ZipNN"], first["codecs"]["copy"]
    speeds = [
        [
            label,
            f"{c['encode_gb_per_s']:.2f}",
            f"{c['encode_gb_per_s'] / peer['encode_gb_per_s']:.1f}x",
            f"{c['decode_gb_per_s']:.2f}",
            f"{c['decode_gb_per_s'] / peer['decode_gb_per_s']:.1f}x",
            f"{c['decode_gb_per_s'] / copy['decode_gb_per_s']:.2f}x",
        ]
        for label, c in first["codecs"].items()
    ]
    headers = ["one thread", "encode GB/s", "vs ZipNN", "decode GB/s", "vs ZipNN", "vs memory copy"]
    labels = [label for label in first["codecs"] if not label.startswith("planes") and label != "copy"]
    sizes = [
        [s["source"], *(f"{s['codecs'][label]['bits_per_weight']:.2f}" for label in ("planes avx2", *labels))]
        for s in sources
    ]
    return "\n".join(
        [
            f"{first['source']} weights in BF16, from memory to memory:",
            "",
            table(headers, speeds),
            "",
            table(["bits/weight", "planes", *labels], sizes),
            "",
            where(result),
        ]
    )


def archive(result: Result) -> str:
    """Time and memory of whole models."""
    seconds = result["seconds"]
    rows = [
        [
            name,
            f"{seconds[name]:.1f} s",
            f"{result['model_bytes'] / seconds[name] / 1e9:.2f}",
            f"{result[f'{name}_over_codec_and_copy']:.2f}x",
            f"{result[f'{name}_peak_mib']} MiB",
        ]
        for name in ("compress", "verify", "decompress")
    ]
    headers = ["", "time", "GB/s", "time / (codec + plain copy)", "peak memory"]
    intro = (
        f"{result['model_bytes'] / 1e9:.2f} GB model, {result['threads']} threads, {result['bits_per_weight']:.2f} "
        f"bits/weight on disk, everything included; largest tensor {result['largest_tensor_bytes'] / 2**20:.0f} MiB. "
        f"In the same run a plain copy took {seconds['copy']:.1f} s, SHA-256 alone {seconds['sha256']:.1f} s."
    )
    return "\n".join([intro, "", table(headers, rows), "", where(result)])


def df11(result: Result) -> str:
    """The DF11 codec."""
    rows = []
    for source in result["sources"]:
        speeds = {key: value for key, value in source.items() if "threads" in key}
        rows.append(
            [
                source["source"],
                f"{source['df11_bits_per_weight']:.2f}",
                f"{source['planes_bits_per_weight']:.2f}",
                *(f"{speeds[key]:.2f}" for key in ("write, 1 threads", "read, 1 threads")),
            ]
        )
    headers = ["weights", "DF11 bits/weight", "planes bits/weight", "DF11 write GB/s", "DF11 read GB/s"]
    return "\n".join([table(headers, rows), "", "One thread. " + where(result)])


def model(result: Result) -> str:
    """A whole model generating."""
    reference = result["variants"][0]
    labels = {"bf16": "BF16 (transformers)", "exact": "exact", "fused": "fused"}
    rows = [
        [
            labels[v["mode"]],
            f"{v['tokens_per_second']:.2f}",
            f"{v['tokens_per_second'] / reference['tokens_per_second']:.2f}x",
            f"{v['first_token_seconds']:.2f} s",
            f"{v['load_seconds']:.2f} s",
            f"{v['weight_bytes'] / 1e9:.2f} GB",
            f"{v['running_peak_beyond_baseline'] / 1e9:.2f} GB",
            "same bits" if v["logits_equal"] else f"logits within {100 * (v['logits_difference'] or 0):.2g} %",
        ]
        for v in result["variants"]
    ]
    headers = ["", "tokens/s", "vs BF16", "first token", "load", "weights", "memory while running", "output"]
    work, exact = result["workload"], next(v for v in result["variants"] if v["mode"] == "exact")
    linears, weights = (exact["ran"][key].get("fused_exact", 0) for key in ("linears_share", "weight_bytes_share"))
    intro = (
        f"Llama of 1.24 B parameters (random weights), {work['prompt_tokens']} prompt tokens, {work['new_tokens']} new "
        f"ones, {result['threads']} threads, medians of {result['rounds']} rounds in turns. In mode exact "
        f"{100 * linears:.0f} % of the linears ({100 * weights:.0f} % of their weights) ran fused in torch's order. "
        "Memory: largest resident size beyond Python and torch."
    )
    return "\n".join([intro, "", table(headers, rows), "", where(result)])


LAYER = {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}
"""How often each matrix of benchmarks/cpu_linear.py occurs in a layer."""


def cpu_linear(result: Result) -> str:
    """Products with the matrices of a layer of Llama-3.1-8B together, and the range over the single ones."""
    products = result["products"]
    labels = [label for label in products[0]["gb_per_s"] if label != "torch"]
    headers = ["tokens", "threads", "torch BF16", *labels, "proven", "differing outputs"]
    rows = []
    for tokens, threads in dict.fromkeys((r["tokens"], r["threads"]) for r in products):
        chosen = [r for r in products if (r["tokens"], r["threads"]) == (tokens, threads)]
        layer = [(r, LAYER[r["name"]] * r["rows"] * r["cols"]) for r in chosen if r["name"] in LAYER]
        seconds = {k: sum(size / r["gb_per_s"][k] for r, size in layer) for k in ("torch", *labels)}
        cells = []
        for label in labels:
            ratios = [r["speedup"][label] for r in chosen]
            cells.append(f"{seconds['torch'] / seconds[label]:.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        speed = sum(size for _, size in layer) / seconds["torch"]
        proven = f"{sum(r['order'] is not None for r in chosen)} of {len(chosen)}"
        differing = str(sum(r["differing"] for r in chosen))
        rows.append([str(tokens), str(threads), f"{speed:.1f} GB/s", *cells, proven, differing])
    intro = (
        "The linears of one layer of Llama-3.1-8B (in brackets: from the slowest to the fastest single matrix, LM head "
        "included), no weights in any cache, against `torch.nn.functional.linear` on BF16 in the same process:"
    )
    return "\n".join([intro, "", table(headers, rows), "", where(result)])


GPU_DECODERS = ("tiles to BF16", "planes to BF16", "DF11 to BF16")
GPU_BATCHES = (1, 8, 32, 64)
GPU_PICTURE = "docs/images/gpu_linear.svg"
NOT_MEASURED = "not measured"
GPU_NOT_MEASURED = (
    "On GPUs, speed and memory are **not measured** at this version. `make gpu` does it on a machine that has one, and "
    "the figures then stand here: tokens at batches from 1 to 64, prefill, loading, every product, the decoders."
)


def gpu(result: Result) -> str:
    """A whole model, products and decoders on a GPU; one line if nothing was measured."""
    if not result:
        return GPU_NOT_MEASURED
    model, load, decode = (result.get(key, {}) for key in ("model", "load", "decode"))
    steps = {step["batch"]: step["step_ms"] for step in model.get("decode", ())}
    pairs = [(f"a token, batch {batch}", steps.get(batch), ".2f", " ms") for batch in GPU_BATCHES]
    pairs.append(("prefill of 2048 tokens", model.get("prefill", {}).get("ms"), ".1f", " ms"))
    memory = model.get("memory", {})
    for key, label in (("weight_bytes", "weights"), ("peak_beyond_weights", "memory beyond the weights")):
        gigabytes = {name: m[key] / 1e9 for name, m in memory.items() if m[key] is not None}
        pairs.append((label, gigabytes, ".2f", " GB"))
    layers = load.get("layers")
    seconds = load.get("load_seconds")
    loading = {**seconds, "fused": seconds.get("exact")} if seconds else None  # the same, whatever runs later
    pairs.append((f"loading ({layers} layers)" if layers else "loading", loading, ".2f", " s"))
    rows = [[label, *_triple(values, form, unit)] for label, values, form, unit in pairs]
    lines = []
    for what in GPU_DECODERS:
        found = [row for row in decode.get("rows", ()) if row["what"] == what and row["gb_per_s"]]
        best = max(found, key=lambda row: row["shape"][0] * row["shape"][1], default=None)
        cells = [NOT_MEASURED] * 3
        if best is not None:
            shape = " x ".join(map(str, best["shape"]))
            cells = [shape, f"{best['gb_per_s']:.0f}", f"{100 * best['of_copy']:.0f} %"]
        lines.append([what, *cells])
    return "\n".join(
        [
            f"Llama of {model.get('layers', 32)} layers in the shape of Llama-3.1-8B (random weights), tokens under "
            "CUDA graphs. Before anything is timed, exact mode's logits are compared with BF16's bit for bit, and "
            "fused products with the same sums from BF16 weights:",
            "",
            table(["", "BF16", "exact", "exact / BF16", "fused", "fused / BF16"], rows),
            "",
            *_ways(model.get("decode", ())),
            gpu_linear(result.get("linear", {})),
            "",
            table(["decoding", "shape", "GB/s read and written", "of a copy's"], lines),
            "",
            _where_gpu(result),
        ]
    )


def _ways(steps: Sequence[dict[str, Any]]) -> list[str]:
    """How the linears were computed; nothing if nothing was measured."""
    labels = {"fused_exact": "straight from compressed weights in cuBLAS's order", "decoded": "decoded first"}
    sentences = []
    for step in steps:
        shares = step.get("weights_share", {}).get("exact", {})
        found = [f"{100 * shares[way]:.0f} % {label}" for way, label in labels.items() if way in shares]
        sentences += [f"at batch {step['batch']} {', '.join(found)}"] if found else []
    return [f"Weights of linears in mode exact: {'; '.join(sentences)}.", ""] if sentences else []


def gpu_linear(result: Result) -> str:
    """Fused products against cuBLAS's, by matrix and tokens; one line if nothing was measured."""
    products = [line for line in result.get("products", ()) if line["ratio"] is not None]
    if not products:
        return f"Fused products against cuBLAS's with BF16, by matrix and tokens: {NOT_MEASURED}."
    tokens = sorted({line["tokens"] for line in products})
    rows = []
    for model, kind in dict.fromkeys((line["model"], line["kind"]) for line in products):
        found = {line["tokens"]: line for line in products if (line["model"], line["kind"]) == (model, kind)}
        shape = next(iter(found.values()))
        cells = [_ratio(found[count]) if count in found else NOT_MEASURED for count in tokens]
        rows.append([model, kind, f"{' + '.join(map(str, shape['rows']))} x {shape['cols']}", *cells])
    copy = NOT_MEASURED if result["copy_gb_per_s"] is None else f"{result['copy_gb_per_s']:.0f} GB/s"
    intro = (
        "Fused products against cuBLAS's with BF16 in the same process, no weights in the L2 cache. In brackets: how "
        f"much of the product's time a copy ({copy}) needs for as many bytes as the compressed weights have. Matrices "
        "with + are one launch; more than 64 tokens are decoded first."
    )
    picture = f"![Fused products against cuBLAS's, by tokens]({GPU_PICTURE})"
    return "\n".join([intro, "", table(["model", "linear", "shape", *map(str, tokens)], rows), "", picture])


def _ratio(line: dict[str, Any]) -> str:
    bound = "" if line["of_bound"] is None else f" ({100 * line['of_bound']:.0f} %)"
    return f"{line['ratio']:.2f}x{bound}"


def _triple(values: dict[str, float | None] | None, form: str, unit: str) -> list[str]:
    """BF16's value, then those of both modes, each with its ratio to BF16's."""
    plain, *others = ((values or {}).get(name) for name in ("bf16", "exact", "fused"))
    cells = [NOT_MEASURED if plain is None else format(plain, form) + unit]
    for value in others:
        cells.append(NOT_MEASURED if value is None else format(value, form) + unit)
        cells.append(f"{value / plain:.2f}x" if plain and value is not None else NOT_MEASURED)
    return cells


def _where_gpu(result: Result) -> str:
    m, d = result["machine"], result["device"]
    torch = m["versions"].get("torch", "?")
    return (
        f"{d['name']}, CUDA {d['driver_cuda']} driver, NVRTC {d['nvrtc']}, torch {torch}, Python {m['python']}; commit "
        f"{m['commit']}, {m['date']} (`benchmarks/results/{result['file']}`)"
    )


def newest_gpu() -> Result:
    """The newest result of ``make gpu``; empty if there is none."""
    found: list[Result] = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        content = json.loads(path.read_text())
        if not content["dry_run"] and "device" in content:
            found.append({**content, "file": path.name})
    return max(found, key=lambda content: str(content["date"]), default={})


PAGES = ("README.md", "docs/guide/attention.md", "docs/guide/io.md", "docs/guide/kv-cache.md")

SECTIONS: dict[str, Callable[[Result], str]] = {
    "kv_quality": lambda result: kv_report.quality(result, where),
    "kv_memory": lambda result: kv_report.memory(result, where),
    "kv_attention": lambda result: kv_report.attention(result, where),
    "block_sparse": lambda result: attention_report.block_sparse(result, where),
    "io_attention": lambda result: attention_report.io_attention(result, where),
    "gpu": gpu,
    "codec": codec,
    "df11": df11,
    "archive": archive,
    "cpu_linear": cpu_linear,
    "model": model,
}


def render(name: str) -> str:
    """One table, or "not measured"."""
    if name == "gpu":
        return gpu(newest_gpu())
    if name == "kv":
        parts = [_stored("kv_quality"), _stored("kv_memory")]
        return kv_report.summary(*parts, where) if any(parts) else NOT_MEASURED
    path = RESULTS / f"{name}.json"
    return SECTIONS[name](json.loads(path.read_text())) if path.exists() else NOT_MEASURED


def _stored(name: str) -> Result:
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def fill(text: str) -> str:
    """A page with its tables as they are now."""
    for name in (*SECTIONS, "kv"):
        rendered = render(name)
        pattern = rf"(<!-- benchmark: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, body=rendered: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main(arguments: list[str]) -> int:
    """Print all tables, or write them into the pages."""
    if "--write" not in arguments:
        for name in (*SECTIONS, "kv"):
            print(f"== {name}\n\n{render(name)}\n")
    else:
        for page in (ROOT / name for name in PAGES):
            page.write_text(fill(page.read_text()))
        kv_report.picture(_stored("kv_memory"), ROOT / kv_report.PICTURE)
        plots.save(newest_gpu().get("linear", {}), ROOT / GPU_PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
