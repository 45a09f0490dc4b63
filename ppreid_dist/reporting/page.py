"""The privacy report as a folder that needs nothing else:

report.json        every number, shape ``ppreid-report/8`` (docs/report.md)
report.html        the same numbers as one page: no script, no request, readable in print and in the dark
card.json, .md     the privacy card: its sum, to go beside a model
figures/*.png      the page's figures, for a paper; panel_*.png only where pictures were asked for
"""

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ppreid_dist.errors import DataError
from ppreid_dist.files import atomic, read_json, write_json, write_text
from ppreid_dist.reporting.card import as_markdown, make_card
from ppreid_dist.reporting.figures import DARK, LIGHT, Drawing, draw_report, draw_strip, ranked
from ppreid_dist.reporting.schema import check_report
from ppreid_dist.reporting.verdict import axis_title, ends, learnt_from, no_measure, number, percent, write_verdict

PANEL_ROWS = {"real": "real", "control": "from unprotected features", "protected": "from protected features"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The same K people three times, uint8 (K, 3, h, w), arrays or CPU tensors: as they are, and as one attacker
    reconstructs them from unprotected and from protected features. ``note`` says how the people were chosen."""

    real_K3hw: Any
    control_K3hw: Any
    protected_K3hw: Any
    attacker: str
    note: str

    def __post_init__(self) -> None:
        for row in PANEL_ROWS:
            pictures, real = self.row(row), self.row("real")
            if pictures.ndim != 4 or pictures.shape[1] != 3 or 0 in pictures.shape or pictures.dtype != np.uint8:
                raise DataError(f"panel.{row}: {pictures.dtype} {pictures.shape} is not uint8 (K, 3, h, w)")
            if pictures.shape != real.shape:
                raise DataError(f"panel.{row}: {pictures.shape} is not the shape of panel.real, {real.shape}")

    def row(self, name: str) -> np.ndarray:
        return np.asarray(getattr(self, f"{name}_K3hw"))


def write_report(report: dict[str, Any], folder: Path, *, panel: Panel | None) -> None:
    """Write ``report.json``, ``report.html``, ``figures/`` and the card into ``folder``, each file whole or not at all.

    Without a panel the page says that pictures are left out, and an earlier report's pictures are removed.
    Raises DataError naming the key where ``report`` has not the shape, or the file that could not be written.
    """
    folder = Path(folder)
    check_report(report, str(folder / "report.json"))
    drawings = draw_report(report)
    strips = {row: draw_strip(panel.row(row)) for row in PANEL_ROWS} if panel else {}
    pngs = {name: drawing.light for name, drawing in drawings.items()}
    pngs |= {f"panel_{row}": strip for row, strip in strips.items()}
    page = _render(report, drawings, panel, strips)
    write_json(folder / "report.json", report)
    for name, png in pngs.items():
        with atomic(folder / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    for row in PANEL_ROWS.keys() - strips.keys():
        (folder / "figures" / f"panel_{row}.png").unlink(missing_ok=True)
    write_text(folder / "report.html", page)
    card = make_card(report)
    write_json(folder / "card.json", card)
    write_text(folder / "card.md", as_markdown(card, report))


def load_report(file: str | Path) -> dict[str, Any]:
    """Read a ``report.json``; DataError naming the file and the missing or mistyped key."""
    report: dict[str, Any] = read_json(file)
    check_report(report, str(file))
    return report


def templates() -> jinja2.Environment:
    """The pages' templates, with the filters by which they write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=number,
        percent=percent,
        count="{:,}".format,
        interval=ends,
        title_of=axis_title,
        learnt_from=learnt_from,
        ranked=ranked,
        gauge=_gauge,
        no_measure=no_measure,
    )
    return environment


def _render(report: dict[str, Any], drawings: dict[str, Drawing], panel: Panel | None, strips: dict[str, bytes]) -> str:
    return (
        templates()
        .get_template("report.html")
        .render(
            report=report,
            verdict=write_verdict(report),
            light=LIGHT,
            dark=DARK,
            figure=lambda name, alt: picture(drawings[name], alt) if name in drawings else Markup(""),
            percent_of=percent,
            panel=panel,
            strips=[(words, len(panel.row(row)), _data(strips[row])) for row, words in PANEL_ROWS.items()]
            if panel
            else [],
        )
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + b64encode(png).decode()


def picture(drawing: Drawing, alt: str) -> Markup:
    """The drawing for the reader's ground; paper takes the light one."""
    return Markup(
        '<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{}"><img src="{}" alt="{}"></picture>'
    ).format(_data(drawing.dark), _data(drawing.light), alt)


def _gauge(interval: dict[str, Any]) -> dict[str, float]:
    """Places in per cent on a scale from 0 to 1.25 for ``value`` and its interval, what lies outside at the edge."""
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    high = value if low is None else 1.25 if high is None else high
    places = {"value": value, "low": value if low is None else low, "high": high}
    return {key: round(100 * min(max(place, 0), 1.25) / 1.25, 2) for key, place in places.items()}
