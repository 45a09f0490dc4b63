"""A sweep's front as files that need nothing else:

front.json         every number (docs/sweep.md)
front.csv          a line per trial
front.html         the front as one page: no script, no request
front/*.png        the page's figures, for a paper
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ppreid_dist.files import atomic, write_json, write_text
from ppreid_dist.reporting.figures import DARK, LIGHT
from ppreid_dist.reporting.front_figures import draw_front
from ppreid_dist.reporting.page import picture, templates
from ppreid_dist.reporting.verdict import axis_title

_FIGURES = ("value", "low", "high")


def write_front(front: dict[str, Any], folder: Path) -> None:
    """Write all of them, each whole or not at all. DataError naming the file that could not be written."""
    drawings = draw_front(front)
    page = templates().get_template("front.html")
    names = {point["name"]: point["method"] or point["name"] for point in front["points"]}
    written = page.render(
        front=front,
        recommended=names.get(front["recommended"]),
        light=LIGHT,
        dark=DARK,
        figure=lambda name, alt: picture(drawings[name], alt) if name in drawings else Markup(""),
        axes={axis: axis_title(axis) for axis in front["front"]},
    )
    write_json(folder / "front.json", front)
    write_text(folder / "front.csv", _table(front))
    for name, drawing in drawings.items():
        with atomic(folder / "front" / f"{name}.png") as temporary:
            temporary.write_bytes(drawing.light)
    write_text(folder / "front.html", written)


def _table(front: dict[str, Any]) -> str:
    """Empty is what was not or could not be measured, ``inf`` the end of an interval that is unbounded."""
    keys = sorted({key for row in front["trials"] for key in row["settings"]})
    names = ["name", "point", "method", "seed", "status", "reason", *keys, "mAP", "control_mAP"]
    names += [f"utility_{end}" for end in _FIGURES]
    for axis in front["front"]:
        names += [f"{axis}_leak_{end}" for end in _FIGURES]
        names += [f"{axis}_{key}" for key in ("attacker", "urr", "urr_reason", "broken")]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in front["trials"]:
        cells = {**row, **row["settings"]}
        if row["status"] == "done":
            cells |= _cells("utility", row["utility"])
            for axis, figures in row["axes"].items():
                leak, urr = figures["leak"], figures["urr"]
                cells |= _cells(f"{axis}_leak", leak) | {f"{axis}_attacker": leak["attacker"]}
                cells |= {f"{axis}_urr": urr["display"]}
                cells |= {f"{axis}_urr_reason": urr["reason"], f"{axis}_broken": urr["broken"]}
        writer.writerow(cells)
    return out.getvalue()


def _cells(name: str, interval: dict[str, Any]) -> dict[str, float | None]:
    unbounded = interval["low"] is not None and interval["high"] is None
    return {f"{name}_{end}": interval[end] for end in _FIGURES} | ({f"{name}_high": math.inf} if unbounded else {})
