"""Tables and the picture of quantized caches, for the README and docs/guide/kv-cache.md; see benchmarks/report.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import table
from benchmarks.plots import save_svg

Result = dict[str, Any]
Where = Callable[[Result], str]

PICTURE = "docs/guide/kv-memory.svg"
SHOWN_TOKENS = (1024, 8192, 32768)
COLORS = {
    "16 bits": "#606060",
    "bitforbit 8": "#8a5fb0",
    "bitforbit 4": "#3b6fb6",
    "bitforbit K4V2": "#4f9d4f",
    "bitforbit 2": "#d1622b",
}
TITLES = {
    "smollm2": "SmolLM2-135M-Instruct (30 layers, heads of 64, a real model that copies and looks up)",
    "demo": "The model in the package (4 layers, 7.9 M parameters; gains nothing from tokens over 128 back)",
}


def summary(quality: Result, memory: Result, where: Where) -> str:
    """The README's table: both claims in one; a missing half is not shown."""
    sizes = {p["name"]: p for p in memory.get("points", ()) if p["tokens"] == SHOWN_TOKENS[-1]}
    model = next((m for m in quality.get("models", ()) if m["model"] == "smollm2"), None)
    scores: dict[str, Result] = {}
    for variant in model["variants"] if model else ():
        scores.setdefault(variant["name"], variant)  # the first of a name has the usual settings
    rows = []
    for name in COLORS:
        size, score = sizes.get(name), scores.get(name)
        cells = [name, "not measured", "not measured", "not measured", "not measured", "not measured"]
        if size:
            cells[1] = f"{size['bits']:.2f}"
            cells[2] = f"{size['cache_bytes'] / 2**20:.0f} MiB ({size['smaller']:.2f}x)"
        if score:
            cells[3] = _percent(score["text"])
            cells[4] = f"{score['text']['kl']:.4f}"
            cells[5] = f"{100 * score['lookup']['found']:.0f} %"
        rows.append(cells)
    headers = ["cache", "bits per element", "32,768 tokens", "perplexity", "KL", "values looked up"]
    layers = memory.get("layers", "?")
    lines = [
        f"Memory: {layers} layers with Llama-3.1-8B's heads, counted from the tensors, everything included (in "
        "brackets: how much smaller than BF16). Quality: SmolLM2-135M at 2 K tokens of source code, against its own "
        "16-bit cache; looked up are 4-digit numbers assigned up to 2 K tokens before:",
        "",
        table(headers, rows),
        "",
    ]
    return "\n".join([*lines, *(where(result) for result in (quality, memory) if result)])


def quality(result: Result, where: Where) -> str:
    """All caches on all tasks, a table per model, then the sensitivity to settings."""
    lines = []
    for model in result["models"]:
        has = [task for task in ("text", "copy", "lookup") if task in model["rows"]]
        headers = ["cache", "settings", "bits", "with window", "perplexity", "", "KL", "same token"]
        headers += ["copy: loss", "KL", "right"] if "copy" in has else []
        headers += ["found"] if "lookup" in has else []
        rows = []
        for v in model["variants"]:
            text = v["text"]
            whole = "" if math.isnan(v["whole_bits"]) else f"{v['whole_bits']:.2f}"
            row = [v["name"], v["settings"], f"{v['bits']:.2f}", whole, f"{text['perplexity']:.3f}", _percent(text)]
            row += [f"{text['kl']:.4f}", f"{100 * text['agrees']:.1f} %"]
            if "copy" in has:
                copy = v["copy"]
                row += [f"{copy['loss']:.3f}", f"{copy['kl']:.4f}", f"{100 * copy['right']:.1f} %"]
            if "lookup" in has:
                row.append(f"{100 * v['lookup']['found']:.0f} %")
            rows.append(row)
        calls = "one at a time" if model["chunk"] == 1 else f"{model['chunk']} at a time"
        asked = model["variants"][0].get("lookup", {}).get("asked")
        lines += [
            f"**{TITLES[model['model']]}.** Rows: {', '.join(f'{n} {task}' for task, n in model['rows'].items())}; "
            f"{model['prefix']} tokens at once, then {model['steps']} {calls}"
            + (f"; {asked} numbers looked up." if asked else "."),
            "",
            table(headers, rows),
            "",
        ]
    for model in result["models"]:
        lines += [*sensitivity(model), ""]
    return "\n".join([*lines, where(result)])


def sensitivity(model: Result) -> list[str]:
    """Attention's error by settings, medians over layers (the worst layer in brackets)."""
    lines = model["sensitivity"]
    settings = list(dict.fromkeys((s["group"], s["residual"], s["sink"]) for s in lines if "group" in s))
    rows = []
    for bits in dict.fromkeys(line["bits"] for line in lines if "group" in line):
        row = [bits]
        for group, residual, sink in settings:
            wanted = {"bits": bits, "group": group, "residual": residual, "sink": sink}
            one = next(line for line in lines if wanted.items() <= line.items())
            row.append(f"{100 * one['median']:.2g} % ({100 * one['worst']:.2g})")
        rows.append(row)
    headers = ["bits", *(f"group {g}, window {r}, sink {s}" for g, r, s in settings)]
    return [
        f"{model['model']}, one step's attention after {model['prefix']} tokens of text: relative error of what it "
        f"gives, median over layers (worst layer); the 16-bit cache's own: {100 * lines[0]['median']:.2g} %.",
        "",
        table(headers, rows),
    ]


def memory(result: Result, where: Where) -> str:
    """Bytes at 1 K, 8 K and 32 K tokens, and peaks at 32 K."""
    shown = [count for count in SHOWN_TOKENS if any(p["tokens"] == count for p in result["points"])]
    names = list(dict.fromkeys(p["name"] for p in result["points"]))
    sizes, peaks = [], []
    for name in names:
        found = {p["tokens"]: p for p in result["points"] if p["name"] == name}
        first, last = found[shown[0]], found[shown[-1]]
        cells = [f"{found[n]['cache_bytes'] / 2**20:.1f} MiB ({found[n]['smaller']:.2f}x)" for n in shown]
        sizes.append([name, f"{first['bits']:.2f}", *cells])
        phases = [f"{last['peaks'][phase] / 2**20:.0f} MiB" for phase in ("prefill", "growth", "decode")]
        cells = [f"{last['resident'] / 2**20:.0f} MiB", *phases, f"{last['peak_smaller']:.2f}x"]
        peaks.append([name, *cells])
    intro = (
        f"{result['layers']} layers, {result['heads']} key-value heads of {result['head_dim']} (Llama-3.1-8B's has 32 "
        "such layers), one row. Bytes of all tensors, everything included (in brackets: how much smaller than BF16's):"
    )
    after = (
        f"Resident size of the process at {shown[-1]} tokens, above what it was before: at the end, and its high-water "
        "mark while the prompt comes in at once, then some tokens at a time, then one by one. In the prompt's call a "
        "layer's keys and values are there in 16 bits, from the model, whatever the cache; for several tokens, which "
        "need a mask, transformers' `sdpa` copies a layer's keys and values for every query head. Last: the highest "
        "mark, how much smaller than BF16's:"
    )
    return "\n".join(
        [
            intro, "", table(["cache", "bits per element", *(f"{n} tokens" for n in shown)], sizes), "", after, "",
            table(["", "at the end", "prompt", "some at a time", "one by one", "peak"], peaks), "",
            f"![Bytes of a cache by tokens]({Path(PICTURE).name})", "", where(result),
        ]
    )  # fmt: skip


def attention(result: Result, where: Where) -> str:
    """Milliseconds of one attention, and how many times faster than torch."""
    rows = []
    for r in result["results"]:
        cells = [
            f"{r['milliseconds'][name]:.2f} ({r['speedup'][name]:.1f}x, {r['speedup_over_grouped'][name]:.1f}x)"
            for name in r["speedup"]
        ]
        times = [f"{r['milliseconds'][name]:.2f}" for name in ("gqa", "repeat", "grouped")]
        rows.append([str(r["context"]), str(r["threads"]), *times, *cells])
    names = [name.replace("k", "K").replace("v", "V") for name in result["results"][0]["speedup"]]
    intro = (
        f"One new token, 32 query heads on 8 key-value heads of 128, groups of 32, in milliseconds on "
        f"`{result['implementation']}`; no cache holds what is read. Torch on a BF16 cache: `gqa` "
        "(scaled_dot_product_attention with enable_gqa), `repeat` (keys and values repeated per query head, as "
        "transformers does), `grouped` (the query heads of a key-value head as rows of one query, written by hand). In "
        "brackets: times faster than the better of `gqa` and `repeat`, and than `grouped`:"
    )
    headers = ["tokens", "threads", "gqa", "repeat", "grouped", *names]
    return "\n".join([intro, "", table(headers, rows), "", where(result)])


def _percent(scores: Result) -> str:
    """The change of perplexity, and its standard error."""
    change, error = scores["loss_difference"], scores.get("loss_difference_error", math.nan)
    if change == 0:
        return "reference"
    shown = f"{100 * math.expm1(change):+.2f}"
    return f"{shown} %" if math.isnan(error) else f"{shown} ± {100 * error:.2f} %"


def picture(result: Result, path: Path) -> bool:
    """Draw bytes and peaks by tokens as SVG; nothing if nothing was measured. Raises ImportError without matplotlib."""
    points = result.get("points", ())
    if not points:
        return False
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(panels, ("cache_bytes", "peak"), ("cache", "peak of the process"), strict=True):
        for name, color in COLORS.items():
            line = sorted((p["tokens"], p[key] / 2**20) for p in points if p["name"] == name)
            if line:
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3, color=color, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sorted({p["tokens"] for p in points})
        axes.set_xticks(ticks, [f"{count // 1024} K" for count in ticks], minor=False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens")
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"MiB, {result['layers']} layers")
    panels[0].legend(frameon=False, fontsize=9)
    save_svg(figure, path)
    return True
