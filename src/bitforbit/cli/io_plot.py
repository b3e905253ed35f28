"""The picture of ``io --plot``: words moved over the size of the fast memory, with the lower bound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bitforbit.iomodel import Choice

_POINTS = 240
_STYLES = {
    "standard": ("#9a9a9a", "-"),
    "flash1": ("#e3a87f", "-"),
    "flash2": ("#d1622b", "-"),
    "square": ("#9db8dc", "-"),
    "square_improved": ("#3b6fb6", "-"),
    "rectangular": ("#3b6fb6", ":"),
}


def save_plot(path: Path, choice: Choice, place: str) -> None:
    """Draw every algorithm's words and the lower bound over M, both logarithmic, and save them as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bitforbit.iomodel import ALGORITHMS, lower_bound

    n, d = choice.n, choice.d
    low, high = min(64, choice.memory), max(16 * d * d, 4 * choice.memory)
    memories = sorted({int(m) for m in np.geomspace(low, high, _POINTS)})
    figure = Figure(figsize=(8.4, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, algorithm in ALGORITHMS.items():
        fitting = [m for m in memories if m >= algorithm.least_memory(d)]
        color, line = _STYLES[name]
        words = [algorithm.words(n, d, m) for m in fitting]
        axes.plot(fitting, words, line, color=color, linewidth=1.6, label=algorithm.title)
    bound = [lower_bound(n, d, m) for m in memories]
    axes.fill_between(memories, bound, min(bound) / 2, color="#e8e8e8", label="impossible (lower bound)")
    axes.axvline(d * d, color="#555555", linewidth=0.8, linestyle="--")
    axes.text(d * d, 0.99, " M = d²", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
    axes.axvline(choice.memory, color="black", linewidth=0.8)
    axes.text(choice.memory, 0.02, f" {place}", transform=axes.get_xaxis_transform(), fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=min(bound) / 2)
    axes.set_xlabel("fast memory M, words")
    axes.set_ylabel("words moved")
    axes.set_title(f"attention, one head, N = {n:,}, d = {d}", fontsize=11)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor="white")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
