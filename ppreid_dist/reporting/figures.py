"""The report's figures. Every drawing is made twice, on light and on dark ground; files and paper take the light one.

Colours mean the same everywhere (Okabe and Ito's blue and vermilion, told apart by colour-blind readers): the
protected model, the unprotected control, the prior-only floor. Shapes: K people, h height, w width.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

WIDTH, ROW, DPI = 4.9, 0.36, 200  # inches, inches, dots an inch: legible at 330 CSS pixels, sharp at 980
R_SHOWN = (-0.6, 2.5)  # an attacker of hardly any reach has intervals that would flatten the others


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    muted: str
    line: str
    control: str
    protected: str
    floor: str
    warning: str


LIGHT = Theme("#ffffff", "#1a1d21", "#5a646e", "#dfe3e8", "#c65102", "#0067a8", "#878f98", "#e3a008")
DARK = Theme("#171b21", "#e6e9ed", "#9aa4af", "#2e353d", "#f2914a", "#5ab4f0", "#8b949e", "#e3b341")


@dataclass(frozen=True)
class Drawing:
    """One figure as PNG, for light and for dark ground."""

    light: bytes
    dark: bytes


def draw_report(report: dict[str, Any]) -> dict[str, Drawing]:
    """All figures of a checked report by name: ``scores_<axis>``, ``leak_<axis>``, ``curve_<axis>``, ``probe``.

    A figure without anything to draw (no attackers, no curve, no probe) is absent.
    """
    jobs: dict[str, Callable[[Theme], Figure]] = {}
    for name, axis in report["axes"].items():
        if axis["attackers"]:
            jobs[f"scores_{name}"] = partial(_scores, axis)
            jobs[f"leak_{name}"] = partial(_leak, axis)
        if axis["curve"]:
            jobs[f"curve_{name}"] = partial(_curve, axis)
    if report["probe"] and report["probe"]["history"]:
        jobs["probe"] = partial(_probe, report["probe"])
    description = f"{report['name']}: {report['protocol']}"
    return {name: draw(job, description) for name, job in jobs.items()}


def draw(job: Callable[[Theme], Figure], description: str) -> Drawing:
    """A figure on both grounds; a figure that travels keeps its ``description``."""
    return Drawing(*(_png(job, theme, description) for theme in (LIGHT, DARK)))


def draw_strip(pictures_K3hw: np.ndarray, *, height: int = 192) -> bytes:
    """K pictures (uint8) side by side with clear gaps as one PNG, enlarged by whole pixels to about ``height``."""
    K, _, h, w = pictures_K3hw.shape
    scale, gap = max(1, round(height / h)), max(1, w // 16)
    strip = np.zeros((h, K * (w + gap) - gap, 4), dtype=np.uint8)
    for k, picture_3hw in enumerate(pictures_K3hw):
        left = k * (w + gap)
        strip[:, left : left + w, :3] = picture_3hw.transpose(1, 2, 0)
        strip[:, left : left + w, 3] = 255
    file = io.BytesIO()
    matplotlib.image.imsave(file, strip.repeat(scale, axis=0).repeat(scale, axis=1), format="png")
    return file.getvalue()


def ranked(attackers: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The attackers as tables and figures show them: the strongest first, those that say nothing last."""

    def weakness(item: tuple[str, dict[str, Any]]) -> tuple[bool, float]:
        value = item[1]["r"]["value"]
        return item[1]["status"] == "broken" or value is None, -(value or 0)

    return sorted(attackers.items(), key=weakness)


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's matplotlibrc must not change a published figure
        matplotlib.rcParams.update(
            {
                "font.size": 9.5,
                "text.parse_math": False,  # names are data: a "$" in one is no formula
                "text.color": theme.ink,
                "axes.labelcolor": theme.muted,
                "axes.edgecolor": theme.line,
                "axes.facecolor": theme.paper,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.unicode_minus": True,
                "figure.facecolor": theme.paper,
                "grid.color": theme.line,
                "grid.linewidth": 0.7,
                "xtick.color": theme.line,
                "ytick.color": theme.line,
                "xtick.labelcolor": theme.muted,
                "ytick.labelcolor": theme.ink,
                "legend.frameon": False,
                "legend.fontsize": 9,
                "legend.handlelength": 1.5,
                "legend.columnspacing": 1.4,
                "figure.constrained_layout.use": True,
            }
        )
        yield


def _png(job: Callable[[Theme], Figure], theme: Theme, description: str) -> bytes:
    with _style(theme):
        file = io.BytesIO()
        metadata = {"Software": None, "Description": description}
        FigureCanvasAgg(job(theme)).print_png(file, metadata=metadata)
        return file.getvalue()


def canvas(height: float) -> tuple[Figure, Axes]:
    """A figure of the page's width and so many inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    return figure, figure.add_subplot()


def legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, in a row."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))


def extent(name: Annotation) -> Bbox:
    """Where an annotation's text is, without the line to its point, in pixels."""
    name.get_window_extent()  # moves it to its place
    return Text.get_window_extent(name)


def _attacker_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _scores(axis: dict[str, Any], theme: Theme) -> Figure:
    rows = ranked(axis["attackers"])
    figure, axes = canvas(1.25 + ROW * len(rows))
    y = np.arange(len(rows))
    floor, protected, control = (_numbers([row[key] for _, row in rows]) for key in ("floor", "protected", "control"))
    works = np.array([row["status"] != "broken" for _, row in rows])
    blue, orange = (np.where(works, colour, theme.floor) for colour in (theme.protected, theme.control))
    axes.barh(y, control - floor, left=floor, height=0.5, color=orange, alpha=0.22)
    axes.barh(y, protected - floor, left=floor, height=0.2, color=blue, alpha=0.85)
    points: dict[str, Any] = {"zorder": 3, "linewidths": 1.8}
    axes.scatter(floor, y, marker="|", s=120, color=theme.floor, label="floor", **points)
    axes.scatter(protected, y, marker="o", s=26, color=blue, zorder=4)
    axes.scatter(control, y, marker="|", s=120, color=orange, **points)
    axes.scatter([], [], marker="o", s=26, color=theme.protected, label="protected")
    axes.scatter([], [], marker="|", s=120, linewidths=1.8, color=theme.control, label="unprotected")
    _attacker_rows(axes, [name if ok else f"{name} (broken)" for (name, _), ok in zip(rows, works, strict=True)])
    axes.set_xlabel(axis["metric"])
    scored = np.concatenate([floor, protected, control])
    scored = scored[np.isfinite(scored)]
    if scored.size:
        margin = 0.04 * (np.ptp(scored) or 1)
        axes.set_xlim(scored.min() - margin, scored.max() + margin)
    legend(figure, axes)
    return figure


def _leak(axis: dict[str, Any], theme: Theme) -> Figure:
    rows = ranked(axis["attackers"])
    figure, axes = canvas(1.25 + ROW * len(rows))
    left, right = -0.12, 1.2
    for y, (name, row) in enumerate(rows):
        r = row["r"]
        if r["value"] is None:
            axes.text(0.03, y, f"{row['status']}: no ratio", va="center", color=theme.muted, fontsize=9)
            continue
        value, low, high = np.clip([r["value"], *ends(r)], *R_SHOWN)
        axes.plot([low, high], [y, y], color=theme.protected, linewidth=2.2, solid_capstyle="butt")
        strongest = name == axis["leak"]["attacker"]
        face = theme.protected if strongest else theme.paper
        axes.plot(value, y, "o", color=theme.protected, markersize=6.5, markerfacecolor=face, markeredgewidth=1.6)
        left, right = min(left, low - 0.05), max(right, high + 0.05)
    axes.axvline(0, color=theme.floor, linewidth=1.4, label="floor", zorder=1)
    axes.axvline(1, color=theme.control, linewidth=1.4, label="unprotected", zorder=1)
    axes.axvspan(1, right, color=theme.control, alpha=0.09, linewidth=0)
    if (leak := axis["leak"]["value"]) is not None:
        dashes = (0, (4, 3))
        axes.axvline(np.clip(leak, left, right), color=theme.protected, linewidth=1.2, linestyle=dashes, label="r")
    axes.plot([], [], "o", color=theme.protected, markersize=6.5, label="finds most")
    _attacker_rows(axes, [name for name, _ in rows])
    axes.set_xlim(left, right)
    axes.set_xlabel("each attacker's own ratio, with its interval; r of all")
    legend(figure, axes)
    return figure


def _curve(axis: dict[str, Any], theme: Theme) -> Figure:
    figure, axes = canvas(3.1)
    points = sorted(axis["curve"], key=lambda point: point["n"])
    n = np.array([point["n"] for point in points])
    axes.axhline(1, color=theme.control, linewidth=1.4, label="unprotected")
    axes.axhline(0.5, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), label="half")
    for name in dict.fromkeys(name for point in points for name in point["attackers"]):
        values = [_value(point["attackers"].get(name)) for point in points]
        axes.plot(n, values, color=theme.floor, linewidth=1, alpha=0.7, marker=".", markersize=4)
    axes.plot([], [], color=theme.floor, linewidth=1, marker=".", label="each attacker")
    strongest = np.array([_value(point["r"]) for point in points])
    low, high = np.array([ends(point["r"]) for point in points]).T
    axes.fill_between(n, low, high, color=theme.protected, alpha=0.16, linewidth=0)
    axes.plot(
        n, strongest, color=theme.protected, linewidth=2.2, marker="o", markersize=5.5, label="strongest of these"
    )
    if len(n) == 1:  # a band needs two ends
        axes.vlines(n, low, high, color=theme.protected, linewidth=2.2)
    if (half := axis["n50"]["value"]) is not None and n[0] <= half <= n[-1]:
        axes.vlines(half, 0, 0.5, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(half, 0.02, " n50", color=theme.muted, fontsize=9, va="bottom")
    _log_ticks(axes, n)
    bottom, top = np.nanmin([0, *low, *strongest]), np.nanmax([1, *high, *strongest])
    axes.set_ylim(max(bottom, R_SHOWN[0]) - 0.05, min(top, R_SHOWN[1]) + 0.08)
    axes.grid(axis="y")
    axes.set_xlabel("people the attacker trained on (logarithmic)")
    axes.set_ylabel("residual leak r@n")
    legend(figure, axes)
    return figure


def _log_ticks(axes: Axes, n: np.ndarray) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()
    shown: list[int] = []
    for value in n[::-1]:  # the largest is the one the verdict speaks of: it keeps its label
        if not shown or np.log(shown[-1] / value) > 0.09 * np.log(n[-1] / n[0]):
            shown.append(int(value))
    axes.set_xticks(shown, [f"{value:,}" for value in shown])
    axes.set_xlim(n[0] / 1.15, n[-1] * 1.15)


def _probe(probe: dict[str, Any], theme: Theme) -> Figure:
    figure, axes = canvas(2.9)
    images, apparent, fresh = (_numbers([p[key] for p in probe["history"]]) for key in ("images", "apparent", "fresh"))
    marker = "o" if len(images) < 40 else ""
    line: dict[str, Any] = {"color": theme.protected, "marker": marker, "markersize": 3.5}
    axes.plot(images, apparent, linewidth=1.4, linestyle=(0, (4, 2)), label="apparent (in training)", **line)
    axes.plot(images, fresh, linewidth=2.2, label="fresh attacker", **line)
    shade: dict[str, Any] = {"color": theme.warning, "alpha": 0.3, "linewidth": 0, "label": "masking"}
    axes.fill_between(images, apparent, fresh, where=apparent > fresh, interpolate=True, **shade)
    axes.set_ylim(0, 1.12 * np.nanmax([*apparent, *fresh]))
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(axis="y")
    axes.set_xlabel("images seen in training")
    axes.set_ylabel(f"error ({probe['unit']})")
    legend(figure, axes)
    return figure


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _value(interval: dict[str, Any] | None) -> float:
    return np.nan if interval is None or interval["value"] is None else interval["value"]


def ends(interval: dict[str, Any]) -> tuple[float, float]:
    """Low and high; an unbounded high end lies beyond every axis, and without an interval both are the value."""
    if interval["low"] is None:
        return _value(interval), _value(interval)
    return interval["low"], R_SHOWN[1] + 1 if interval["high"] is None else interval["high"]
