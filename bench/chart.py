"""The distributions of latency as one SVG: for each side, the share of calls that were done within a time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .measure import Samples

_COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#b07aa1",
    "#76b7b2",
    "#9c755f",
    "#edc948",
    "#ff9da7",
    "#808080",
)
_POINTS = 400
"""Points of one curve: enough to see one call in 400."""
_INK = "#808080"
"""Grey reads on white and on black; the background stays transparent."""


def draw(curves: dict[str, Samples], path: Path) -> None:
    """Write the chart to ``path``."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "skialith", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with mpl.rc_context(style):
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes: Any = figure.add_subplot()
        colours: dict[str, str] = {}
        for name, samples in curves.items():
            side = name.partition(" (")[0]  # dashed on asyncio, and in the colour that it has on uvloop
            colour = colours.setdefault(side, _COLOURS[len(colours) % len(_COLOURS)])
            seconds = [second for each in samples.rounds for second in each]
            times = [second * 1e6 for second in statistics.quantiles(seconds, n=_POINTS + 1, method="inclusive")]
            shares = [(n + 1) / (_POINTS + 1) for n in range(_POINTS)]
            line = "--" if "asyncio" in name else "-"
            axes.plot(times, shares, label=name, color=colour, linestyle=line, linewidth=1.6)
        _describe(axes)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _describe(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    axes.set_xscale("log")
    axes.set_xlim(20, 20_000)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g} us" if us < 1000 else f"{us / 1000:g} ms"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("time until one event of 200 bytes is acknowledged")
    axes.set_ylabel("share of calls done by then")
    axes.grid(visible=True, which="both", color=_INK, alpha=0.25, linewidth=0.5)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
