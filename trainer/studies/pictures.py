"""Pictures of the studies, in the style of the release's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.reporting.charts import LOCAL, MUTED, SERIES, TEACHER, drawing, svg
from trainer.statistics.scores import Floats, Interval

COLOURS = {"base": MUTED, "student": LOCAL, "teacher": TEACHER}


@dataclass(frozen=True)
class Series:
    """A system's values over the places of a picture; None where it has none."""

    name: str
    values: Sequence[Interval | None]


def curves(title: str, x: Sequence[int], series: Sequence[Series], label: str) -> str:
    """Scores over a number, each with its interval as a band."""
    with drawing(title) as (figure, axes):
        for one, colour in zip(series, _colours(series), strict=True):
            at = [(place, value) for place, value in zip(x, one.values, strict=True) if value is not None]
            places = [place for place, _ in at]
            axes.plot(
                places,
                [value.mean for _, value in at],
                "o-",
                color=colour,
                markersize=4,
                clip_on=False,
                label=one.name,
            )
            low, high = [value.low for _, value in at], [value.high for _, value in at]
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=label, ylabel="score", ylim=(0, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend(loc="outside lower center", ncols=len(series))
        return svg(figure, title)


def intervals(title: str, places: Sequence[str], series: Sequence[Series], *, share: bool = True) -> str:
    """Values with their intervals, one place below the other.

    Args:
        share: values from 0 to 1, shown in percent; else a difference around 0.
    """
    with drawing(title) as (figure, axes):
        offsets = [0.24 * (index - (len(series) - 1) / 2) for index in range(len(series))]
        for one, colour, offset in zip(series, _colours(series), offsets, strict=True):
            _points(axes, one, colour, offset)
        axes.set(yticks=range(len(places)), ylim=(len(places) - 0.5, -0.5))
        axes.set_yticklabels(places)
        axes.yaxis.grid(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if share:
            axes.set(xlim=(0, 1.02), xlabel="score")
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=len(series))
        return svg(figure, title)


def pairs(title: str, x: Floats, y: Floats, names: tuple[str, str]) -> str:
    """Two values of the same things, both [n], against the line on which they are equal."""
    with drawing(title) as (figure, axes):
        ends = (0, 1.05 * max(float(x.max()), float(y.max()), 1e-6))
        axes.plot(ends, ends, color=MUTED, linewidth=0.9, dashes=(3, 2))
        axes.scatter(x, y, s=10, color=LOCAL, alpha=0.5, linewidth=0)
        axes.set(xlim=ends, ylim=ends, xlabel=names[0], ylabel=names[1])
        return svg(figure, title)


def _points(axes: Axes, one: Series, colour: str, offset: float) -> None:
    at = [(place, value) for place, value in enumerate(one.values) if value is not None]
    look: Any = {"fmt": "o", "color": colour, "markersize": 5, "elinewidth": 2, "clip_on": False}
    means = [value.mean for _, value in at]
    below = [max(0.0, value.mean - value.low) for _, value in at]
    above = [max(0.0, value.high - value.mean) for _, value in at]
    axes.errorbar(means, [place + offset for place, _ in at], xerr=[below, above], label=one.name, **look)


def _colours(series: Sequence[Series]) -> list[str]:
    return [
        COLOURS.get(one.name, SERIES[index % len(SERIES)] if len(series) > 1 else LOCAL)
        for index, one in enumerate(series)
    ]
