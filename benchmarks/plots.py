"""The README's picture of fused products on a GPU, from the newest result of ``make gpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {"q+k+v": "#3b6fb6", "o": "#d1622b", "gate+up": "#4f9d4f", "down": "#8a5fb0", "LM head": "#9a9a9a"}
"""One line each: a layer's launches, and the LM head. Single matrices of the groups are in the table only."""
FUSED_TOKENS = 64


def save(result: dict[str, Any], path: Path) -> bool:
    """Draw BF16's time by fused's over the tokens, a panel per model, as SVG; nothing if nothing was measured.

    Returns whether there was. Raises ImportError where matplotlib is missing and something is to be drawn.
    """
    lines = [one for one in result.get("products", ()) if one["ratio"] is not None and one["kind"] in COLORS]
    if not lines:
        return False
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(line["model"] for line in lines))
    figure = Figure(figsize=(1 + 3.8 * len(models), 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        _panel(axes, model, [line for line in lines if line["model"] == model])
    figure.axes[0].set_ylabel("time of cuBLAS BF16 / time of fused")
    figure.axes[-1].legend(frameon=False, fontsize=9)
    save_svg(figure, path)
    return True


def save_svg(figure: Any, path: Path) -> None:
    """Write a matplotlib figure: the same file from the same figures, without trailing blanks, as tracked texts are."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "bitforbit", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))


def _panel(axes: Any, model: str, lines: list[dict[str, Any]]) -> None:
    tokens = sorted({line["tokens"] for line in lines})
    for kind, color in COLORS.items():
        points = sorted((line["tokens"], line["ratio"]) for line in lines if line["kind"] == kind)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=kind)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    if tokens[-1] > FUSED_TOKENS:
        axes.axvspan(FUSED_TOKENS * 2**0.5, tokens[-1] * 2**0.25, color="#f0f0f0", zorder=0)
        axes.text(tokens[-1], axes.get_ylim()[0], "decoded", ha="center", va="bottom", fontsize=8, color="#606060")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens], minor=False)
    axes.set_xlabel("tokens")
    axes.set_title(model, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
