"""The picture of ``bench --plot``: speed, latency, loading and memory of each variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitforbit.integrations.generation.compare import Comparison

_COLORS = {"bf16": "#9a9a9a", "exact": "#3b6fb6", "fused": "#d1622b"}
_LABELS = {"bf16": "BF16", "exact": "exact", "fused": "fused"}


def save_plot(path: Path, result: Comparison) -> None:
    """Draw four panels and save them as PNG; the heading says how much faster and smaller the compressed model is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    variants = result.variants
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    names = [variant.mode for variant in variants]
    memory = [(v.alone.gpu_running_peak or v.alone.running_peak or v.alone.peak or 0) / 1e9 for v in variants]
    panels = (
        ("tokens/s (more is better)", [v.tokens_per_second for v in variants], "{:.1f}"),
        ("first token, s", [v.first_token_seconds for v in variants], "{:.2f}"),
        ("loading, s", [v.alone.load_seconds for v in variants], "{:.2f}"),
        ("memory while generating, GB", memory, "{:.2f}"),
    )
    for axes, (title, values, form) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _bars(axes, title, names, values, form)
    work = result.workload
    figure.suptitle(
        f"{result.directory.path.name}: batch {work.batch}, {work.prompt_tokens} + {work.new_tokens} tokens, "
        f"{result.threads} thread(s)",
        fontweight="bold",
    )
    figure.savefig(path, dpi=130)


def _bars(axes: Any, title: str, names: list[Any], values: list[float], form: str) -> None:
    places = range(len(names))
    axes.bar(places, values, width=0.62, color=[_COLORS[name] for name in names])
    for place, value in zip(places, values, strict=True):
        ratio = f"\n{value / values[0]:.2f}x" if place and values[0] else ""
        axes.text(place, value, form.format(value) + ratio, ha="center", va="bottom", fontsize=9)
    axes.set_xticks(list(places), [_LABELS[name] for name in names])
    axes.set_title(title, fontsize=11)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(y=0.22)
