"""The picture of ``plan --plot``: a stack of memory for each setting, and memory over the context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bitforbit.planner import Plan, Row

_PARTS = (("weights", "#3b6fb6"), ("scratch", "#9db8dc"), ("kv", "#d1622b"), ("activations", "#cccccc"))
_LABELS = {"scratch": "decoding", "kv": "KV cache", "activations": "other"}
_POINTS = 60
_COLORS = {"bf16": "#777777", "exact": "#3b6fb6", "fused": "#d1622b", "df11": "#5a9367"}
_DASHES = ("-", "--", "-.", ":", (0, (1, 4)))


def save_plot(path: Path, title: str, plan: Plan) -> None:
    """Draw the picture and save it as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, max(3.6, 1.8 + 0.3 * len(plan.rows))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _stacks(left, plan)
    _lines(right, plan)
    request = plan.request
    count = f"{request.split.gpus} x " if request.split.gpus > 1 else ""
    figure.suptitle(f"{title[-60:]} on {count}{request.gpu.name}, batch {request.batch}", fontweight="bold")
    figure.savefig(path, dpi=130)


def _stacks(axes: Any, plan: Plan) -> None:
    y = np.arange(len(plan.rows))
    start = np.zeros(len(plan.rows))
    for name, color in _PARTS:
        sizes = np.array([getattr(row.memory, name) for row in plan.rows]) / 1e9
        axes.barh(y, sizes, left=start, height=0.75, color=color, label=_LABELS.get(name, name))
        start += sizes
    axes.axvline(plan.request.capacity / 1e9, color="black", linewidth=1)
    axes.set_yticks(y, [_label(row) for row in plan.rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB on the fullest GPU (line: usable)")
    axes.set_xlim(left=0)
    contexts = {row.context for row in plan.rows}
    axes.set_title(f"context {contexts.pop():,}" if len(contexts) == 1 else "longest contexts", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(axes: Any, plan: Plan) -> None:
    from bitforbit.planner import Load
    from bitforbit.planner.request import LONGEST, peak, stages_of

    request = plan.request
    longest = max((row.longest for row in plan.rows if row.longest < LONGEST // 2), default=0)
    end = max(longest * 5 // 4, request.context or 0, 1024)
    contexts = sorted({int(n) for n in np.linspace(1, end, _POINTS)})
    settings = {kv.name: kv for kv in request.caches}
    lowest = float("inf")
    dashes = dict(zip(settings, _DASHES * len(settings), strict=False))
    for row in plan.rows:
        stages = stages_of(request, row.method, settings[row.kv])
        load = Load(1, request.batch, request.call)
        totals = [peak(stages, replace(load, context=n)).total / 1e9 for n in contexts]
        lowest = min(lowest, totals[0])
        axes.plot(contexts, totals, color=_COLORS[row.method], linestyle=dashes[row.kv], label=_label(row))
    axes.axhline(request.capacity / 1e9, color="black", linewidth=1)
    axes.set_ylim(0, max(1.3 * request.capacity / 1e9, 1.2 * lowest))
    axes.set_xlim(0, end)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("GB on the fullest GPU")
    axes.legend(fontsize=7, frameon=False, loc="lower right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: Row) -> str:
    return f"{row.method}, KV {row.kv}"
