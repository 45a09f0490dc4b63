"""The figures of a sweep's front: what privacy costs, on each axis of the leak, and the ratio against λ.

Blue is a protected point, full on the front and faint where it is dominated; vermilion the unprotected control, which
leaks 1 by definition; the ring the recommended point.
"""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from ppreid_dist.reporting.figures import R_SHOWN, Axes, Drawing, Figure, Theme, canvas, draw, ends, extent, legend

_FAINT = 0.3
_LONGEST = 44  # characters of a name in the plane
Ends = tuple[float, float]


def draw_front(front: dict[str, Any]) -> dict[str, Drawing]:
    """By name, for every axis with a leak that is known: ``cost_<axis>`` (mAP against leak), and ``urr_<axis>`` (URR
    against λ) where a ratio is known and points are values of λ rather than methods."""
    jobs: dict[str, Callable[[Theme], Figure]] = {}
    for axis in front["front"]:
        if _measured(front, axis):
            jobs[f"cost_{axis}"] = partial(_cost, front, axis)
        if any(point["axes"][axis]["urr"]["value"] is not None and not point["method"] for point in front["points"]):
            jobs[f"urr_{axis}"] = partial(_urr, front, axis)
    return {name: draw(job, f"{front['name']}: {front['rule']}") for name, job in jobs.items()}


def _measured(front: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    """The points whose leak is known, by an attack that wasn't broken."""
    known = [point for point in front["points"] if point["axes"][axis]["leak"]["value"] is not None]
    return [point for point in known if not point["axes"][axis]["urr"]["broken"]]


def _cost(front: dict[str, Any], axis: str, theme: Theme) -> Figure:
    figure, axes = canvas(3.6)
    best = front["front"][axis]
    points = _measured(front, axis)
    for point in sorted(points, key=lambda point: point["name"] in best):
        x, y, alpha = point["axes"][axis]["leak"], point["mAP"], 1.0 if point["name"] in best else _FAINT
        _cross(axes, x, y, theme.protected, alpha)
    front_line = sorted((p["axes"][axis]["leak"]["value"], p["mAP"]["value"]) for p in points if p["name"] in best)
    if len(front_line) > 1:
        x_line, y_line = np.array(front_line).T
        axes.step(np.clip(x_line, *R_SHOWN), y_line, where="post", color=theme.protected, linewidth=1, alpha=0.5)
    for name, mAP in front["controls"].items():
        axes.plot(
            1, mAP, "s", color=theme.control, markersize=6, label="unprotected" if name == _first(front) else None
        )
    axes.plot([], [], "o", color=theme.protected, markersize=6, label="front")
    axes.plot([], [], "o", color=theme.protected, markersize=6, alpha=_FAINT, label="dominated")
    for point in points:
        if point["name"] == front["recommended"]:
            _ring(axes, _clip(point["axes"][axis]["leak"]["value"]), point["mAP"]["value"], theme)
    axes.axvline(1, color=theme.control, linewidth=1, alpha=0.6, zorder=1)
    axes.grid()
    axes.set_xlabel(f"{axis} leak r (1: unprotected); less is more private")
    axes.set_ylabel("mAP")
    legend(figure, axes)
    _name(axes, axis, sorted(points, key=lambda point: point["name"] not in best), theme)
    return figure


def _name(axes: Axes, axis: str, points: Sequence[dict[str, Any]], theme: Theme) -> None:
    """Each point's name near it, within the plane, where it covers no other name; the first ones choose first, and who
    finds no place goes without."""
    assert isinstance(axes.figure, Figure)
    axes.figure.draw_without_rendering()  # else the plane isn't yet where it will be
    taken: list[Any] = []
    for point in points:
        method = point["method"] or f"λ {point['weight']:g}"
        name = axes.annotate(
            textwrap.shorten(method, _LONGEST, placeholder=" …"),
            (_clip(point["axes"][axis]["leak"]["value"]), point["mAP"]["value"]),
            xytext=(0, 0), textcoords="offset points", fontsize=8, color=theme.muted,
            arrowprops={"arrowstyle": "-", "color": theme.muted, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip
        name.set_in_layout(False)  # or the plane would shrink for it
        for away, right, up in product((5, 16, 27, 38, 49, 60, 71, 82), (1, -1), (1, -1)):
            name.set(ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top")
            name.set_position((5 * right, up * away))
            box = extent(name)
            inside = all(axes.bbox.contains(*corner) for corner in box.corners())
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            name.remove()


def _urr(front: dict[str, Any], axis: str, theme: Theme) -> Figure:
    figure, axes = canvas(3.1)
    best = front["front"][axis]
    points = [point for point in front["points"] if point["axes"][axis]["urr"]["value"] is not None]
    for point in points:
        x, urr, alpha = point["weight"], point["axes"][axis]["urr"], 1.0 if point["name"] in best else _FAINT
        _bars(axes, (x, x), ends(urr), theme.protected, alpha)
        axes.plot(x, urr["value"], "o", color=theme.protected, markersize=6, alpha=alpha)
        if point["name"] == front["recommended"]:
            _ring(axes, x, urr["value"], theme)
    axes.axhline(1, color=theme.control, linewidth=1.4, label="unprotected", zorder=1)
    weights = sorted({point["weight"] for point in points})
    if len(weights) > 1 and weights[-1] / weights[0] > 5:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(_apart(weights), [f"{weight:g}" for weight in _apart(weights)])
    axes.grid(axis="y")
    axes.set_xlabel("λ, the weight of the privacy loss")
    axes.set_ylabel(f"URR, {axis}")
    legend(figure, axes)
    return figure


def _cross(axes: Axes, x: dict[str, Any], y: dict[str, Any], colour: str, alpha: float) -> None:
    """A point with its intervals thin and the spread of its seeds thick, both ways."""
    at = (_clip(x["value"]), y["value"])
    low, high = ends(x)
    _bars(axes, (_clip(low), _clip(high)), (at[1], at[1]), colour, alpha)
    _bars(axes, (at[0], at[0]), ends(y), colour, alpha)
    if x["least"] != x["most"]:
        spread: dict[str, Any] = {"color": colour, "linewidth": 3.2, "alpha": 0.6 * alpha, "solid_capstyle": "butt"}
        axes.plot([_clip(x["least"]), _clip(x["most"])], [at[1], at[1]], **spread)
        axes.plot([at[0], at[0]], [y["least"], y["most"]], **spread)
    axes.plot(*at, "o", color=colour, markersize=6, alpha=alpha)


def _bars(axes: Axes, x: Ends, y: Ends, colour: str, alpha: float) -> None:
    axes.plot(x, y, color=colour, linewidth=1, alpha=0.7 * alpha, solid_capstyle="butt")


def _ring(axes: Axes, x: float, y: float, theme: Theme) -> None:
    axes.plot(
        x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=theme.warning, markeredgewidth=2,
        label="recommended", zorder=5,
    )  # fmt: skip


def _clip(leak: float) -> float:
    return float(np.clip(leak, *R_SHOWN))


def _first(front: dict[str, Any]) -> str:
    return next(iter(front["controls"]))


def _apart(values: Sequence[float]) -> list[float]:
    """Values whose labels don't run into each other."""
    shown: list[float] = []
    span = values[-1] - values[0]
    for value in values:
        if not shown or value - shown[-1] >= 0.04 * span:
            shown.append(value)
    return shown
