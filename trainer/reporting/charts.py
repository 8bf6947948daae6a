"""Pictures of the report: SVG to stand inside the page, in the page's own colours and font.

matplotlib draws with placeholder colours, which become the page's CSS variables: so a picture is
legible on light and on dark ground, and in print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

INK, MUTED, GRID, GROUND = "#010101", "#020202", "#030303", "#040404"
LOCAL, TEACHER, WARN = "#050505", "#060606", "#070707"
SERIES = ("#080808", "#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c")
MARKERS = ("D", "s", "^", "v", "P")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    GROUND: "--ground",
    LOCAL: "--local",
    TEACHER: "--teacher",
    WARN: "--warn",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)},
}
SIZE = (4.7, 3.1)
"""Inches; 338 units wide, so that text keeps its size on a phone."""
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Line:
    """A named curve; `x` and `y` have the same length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def risk_coverage(
    curve: Line, others: Sequence[Line], limit: float, chosen: tuple[float, float] | None
) -> str:
    """Share of the teacher's score that is lost, against the share answered locally.

    Args:
        curve: of the calibrated confidence.
        others: the runners-up, each a point: how much they keep at the same loss.
        limit: the loss that the contract allows, 1 − keep.
        chosen: coverage and loss at the certified threshold, where there is one.
    """
    with drawing("risk-coverage") as (figure, axes):
        axes.plot(curve.x, curve.y, color=LOCAL, linewidth=2.2, zorder=4, label=curve.name)
        for line, colour, marker in zip(others, SERIES, MARKERS, strict=False):
            look: Any = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 7}
            axes.plot(
                line.x, line.y, markeredgecolor=GROUND, zorder=3, label=line.name, clip_on=False, **look
            )
        axes.axhline(limit, color=WARN, linewidth=1)
        near: Any = {"textcoords": "offset points", "fontsize": 8.5}
        axes.annotate(f"allowed: {limit:.1%}", (0, limit), xytext=(3, 3), color=WARN, **near)
        if chosen:
            look = {"color": LOCAL, "markeredgecolor": GROUND, "markersize": 10, "linestyle": "none"}
            axes.plot(*chosen, marker="o", zorder=5, label="certified threshold", clip_on=False, **look)
        top = max([limit * 1.6, *curve.y, *(value for line in others for value in line.y)])
        axes.set(xlim=(0, 1.005), ylim=(0, top * 1.08))
        axes.set(xlabel="answered locally", ylabel="teacher's score lost")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.05 else 1))
        figure.legend(loc="outside lower center", ncols=2, handletextpad=0.5, columnspacing=1.5)
        return svg(figure, "Risk against coverage for the calibrated confidence and its runners-up")


def reliability(predicted: Sequence[float], observed: Sequence[float], rows: Sequence[int]) -> str:
    """Confidence against how often answers of that confidence were as good as the teacher's, per bin."""
    with drawing("reliability") as (figure, axes):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, dashes=(3, 2))
        axes.annotate(
            "perfect", (0.2, 0.2), xytext=(4, -11), textcoords="offset points", color=MUTED, fontsize=8.5
        )
        most = max(rows, default=1)
        sizes = [12 + 60 * count / most for count in rows]
        axes.plot(predicted, observed, color=LOCAL, linewidth=1.4, zorder=3)
        axes.scatter(
            predicted, observed, s=sizes, color=LOCAL, edgecolor=GROUND, linewidth=1, zorder=4, clip_on=False
        )
        axes.set(xlim=(0, 1.02), ylim=(0, 1.04), xlabel="confidence", ylabel="as good as the teacher")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return svg(figure, "Reliability: confidence against the observed share of good answers")


def loss(train: Line, evaluation: Line, best_step: int | None) -> str:
    """Loss while training, with the checkpoint that was kept."""
    with drawing("loss") as (figure, axes):
        axes.plot(train.x, train.y, color=MUTED, linewidth=1, label=train.name)
        axes.plot(
            evaluation.x, evaluation.y, "o-", color=LOCAL, linewidth=1.8, markersize=4, label=evaluation.name
        )
        best = [value for step, value in zip(evaluation.x, evaluation.y, strict=True) if step == best_step]
        if best_step is not None and best:
            axes.axvline(best_step, color=WARN, linewidth=1, dashes=(3, 2))
            axes.plot(best_step, best[0], "o", markersize=9, markerfacecolor="none", markeredgecolor=WARN)
            axes.annotate(
                f"kept: step {best_step}",
                (best_step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4, -9),
                textcoords="offset points",
                ha="right",
                color=WARN,
                fontsize=8.5,
            )
        values = [*train.y, *evaluation.y]
        if values and min(values) > 0 and max(values) / min(values) > 30:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlabel="optimizer step", ylabel="loss per answer token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right" if best_step is None or not best else "best")
        return svg(figure, "Training and evaluation loss")


@contextmanager
def drawing(name: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure to draw on, in the page's style. The name keeps ids in one page apart, and the same each time."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element without prologue, metadata, fixed size or any address."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', text)
    opening = f'<svg role="img" aria-label="{title}" {box.group(0) if box else ""}>'
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r"font-family: [^;\"]+; ?", "", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
