"""The report of what `ppreid attack` left in a folder."""

from pathlib import Path

from ppreid_dist.errors import RunError
from ppreid_dist.files import read_json, read_tensors
from ppreid_dist.reporting.page import Panel, write_report


def report(folder: Path, *, pictures: str | None = None) -> str:
    """Write the report of what `ppreid attack` left in ``folder``; returns where it is, for the user."""
    found = read_json(folder / "attack.json")
    try:
        figures, settings, synthetic, strongest = (
            found[key] for key in ("report", "settings", "synthetic", "strongest")
        )
    except KeyError as error:
        raise RunError(f"{folder / 'attack.json'}: {error.args[0]} is missing; attack again") from None
    choice = pictures or settings["pictures"]
    panel = None
    if choice == "always" or (choice == "synthetic" and synthetic):
        panel = _panel(folder, strongest["protected"], settings["people"], synthetic)
    write_report(figures, folder, panel=panel)
    return f"{folder / 'report.html'} (numbers: {folder / 'report.json'})"


def _panel(folder: Path, attacker: str, people: int, synthetic: bool) -> Panel:
    drawn = read_tensors(folder / "pictures.safetensors")
    shown = min(people, len(drawn["real"]))
    return Panel(
        real_K3hw=drawn["real"][:people],
        control_K3hw=drawn[f"control/{attacker}"][:people],
        protected_K3hw=drawn[f"protected/{attacker}"][:people],
        attacker=attacker,
        note=f"The first query picture of {shown} test people" + (", all synthetic." if synthetic else "."),
    )
