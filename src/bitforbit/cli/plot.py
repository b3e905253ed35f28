"""The picture of ``inspect --plot``: how exponents are distributed, how close each kind of tensor is to its bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from bitforbit.archive import InspectReport
    from bitforbit.cli.inspect import Row

_MAX_BARS = 16
_NAME_LENGTH = 44
_BLUE, _ORANGE = "#3b6fb6", "#d1622b"


def check_plot(path: Path) -> None:
    """Raise UsageError or MissingDependencyError early if the picture could not be drawn or saved."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError("--plot needs matplotlib: pip install matplotlib") from None
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: expected the name of a .png file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: expected a directory {path.parent} to save it in")


def save_plot(
    path: Path,
    title: str,
    report: InspectReport,
    rows: Sequence[Row],
    counts: Mapping[str, npt.NDArray[np.int64]],
) -> None:
    """Draw the picture and save it as PNG. counts are exponent histograms ``[256]`` by dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    floats = [row for row in rows if row.shannon_bound is not None and row.bits_per_weight is not None]
    bars = floats[:_MAX_BARS]
    figure = Figure(figsize=(13, max(4.2, 1.9 + 0.32 * len(bars))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _exponents(left, counts)
    _sizes(right, bars, len(floats))
    total = report.total
    rate = "" if total.bits_per_weight is None else f": {total.bits_per_weight:.2f} bits/weight"
    bound = "" if total.shannon_bound is None else f", bound {total.shannon_bound:.2f}"
    forecast = "" if report.compressed else " (forecast)"
    figure.suptitle(f"{_shortened(title, 80)}{rate}{bound}{forecast}", fontweight="bold")
    figure.savefig(path, dpi=130)


def _exponents(axes: Any, counts: Mapping[str, npt.NDArray[np.int64]]) -> None:
    if not counts:
        axes.set_title("no floats")
        axes.set_axis_off()
        return
    dtype = max(counts, key=lambda name: int(counts[name].sum()))
    layout = dtypes.FLOAT_LAYOUTS[dtype]
    share = 100 * counts[dtype] / counts[dtype].sum()
    bias = (1 << (layout.exponent_bits - 1)) - 1
    used = np.flatnonzero(share)
    visible = np.flatnonzero(share >= 0.001)
    axes.bar(visible - bias, share[visible], width=0.85, color=_BLUE)
    axes.set_xlabel("exponent e: weights of magnitude $2^e$ to $2^{e+1}$")
    axes.set_ylabel(f"% of the {dtype} weights")
    axes.set_title(f"{len(used)} of {1 << layout.exponent_bits} exponents occur", fontsize=11)
    top = np.sort(share)[::-1]
    axes.text(
        0.03,
        0.97,
        f"most frequent 3: {top[:3].sum():.1f} %\nmost frequent 6: {top[:6].sum():.1f} %"
        f"\nmost frequent 9: {top[:9].sum():.2f} %",
        transform=axes.transAxes,
        va="top",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def _sizes(axes: Any, bars: Sequence[Row], kinds: int) -> None:
    if not bars:
        axes.set_title("no compressible tensors")
        axes.set_axis_off()
        return
    y = np.arange(len(bars))
    rates = [row.bits_per_weight or 0.0 for row in bars]
    bounds = [row.shannon_bound or 0.0 for row in bars]
    widths = [float(dtypes.bits(row.dtype)) for row in bars]
    axes.barh(y, widths, height=0.72, color="#eeeeee", label="original")
    axes.barh(y, rates, height=0.72, color=_BLUE, label="stored")
    axes.vlines(bounds, y - 0.42, y + 0.42, color=_ORANGE, linewidth=2.2, label="bound (exponent entropy + rest)")
    for i, rate in enumerate(rates):
        axes.text(0.2, i, f"{rate:.2f}", va="center", ha="left", color="white", fontsize=8, fontweight="bold")
    names = [f"{_shortened(row.name, _NAME_LENGTH)}{f' ({row.count})' if row.count > 1 else ''}" for row in bars]
    axes.set_yticks(y, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(widths) * 1.02)
    axes.set_xlabel("bits per weight")
    axes.set_title(
        "kinds of tensors" if kinds == len(bars) else f"the {len(bars)} largest of {kinds} kinds of tensors",
        fontsize=11,
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[3 - length :]
