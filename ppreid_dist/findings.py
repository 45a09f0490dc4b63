"""What ``report.json`` says of an attack: the figures that were found, and what they were found on.

Its shape is ``reporting.schema``'s. Shapes: Q query pictures.
"""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppreid_dist import __version__
from ppreid_dist.attacks.judging import Judge
from ppreid_dist.attacks.suite import SuiteResult
from ppreid_dist.data.dataset import is_synthetic, open_split
from ppreid_dist.data.index import read_meta
from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.export import stored_in_words
from ppreid_dist.evaluation.ranking import Ranking
from ppreid_dist.experiment import Config, load_run
from ppreid_dist.files import read_json
from ppreid_dist.models.folder import load_extractor
from ppreid_dist.models.stores.base import StoreConfig
from ppreid_dist.reporting.schema import SCHEMA
from ppreid_dist.training.tracking import read_metrics


def findings(
    config: Config,
    control: Path,
    protected: Path,
    judges: Sequence[Judge],
    result: SuiteResult,
    rankings: dict[str, Ranking],
    pids_Q: np.ndarray,
) -> dict[str, Any]:
    """The report of ``protected`` against ``control``; ``rankings`` are theirs, by "control" and "protected"."""
    ranking = rankings["protected"]
    bootstrap = Bootstrap(pids_Q, config.attack.resamples, config.attack.seed, 0.95)
    of, over = bootstrap.means({"protected": ranking.ap_Q, "control": rankings["control"].ap_Q})
    ratio = bootstrap.interval(of / over)
    training = {name: _training(run) for name, run in (("control", control), ("protected", protected))}
    kid = config.attack.perceptual.kid
    judged = {
        axis: {"name": judge.name, "mAP": found["mAP"], "rank1": found["rank1"], "note": judge.note}
        for (axis, found), judge in zip(result.judges.items(), judges, strict=True)
    }
    return {
        "schema": SCHEMA,
        "protocol": _protocol(config, control, protected, result, judged, pids_Q),
        "name": f"{protected.name} against {control.name}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "ppreid_dist": __version__,
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
        "utility": {
            "control": rankings["control"].summary(),
            "protected": ranking.summary(),
            "ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high},
            "matching": "re-ranked" if config.attack.rerank else "cosine",
        },
        "axes": result.axes,
        "attributes": result.attributes,
        "whitebox": result.whitebox,
        "linkage": result.linkage,
        "auxiliary": result.auxiliary,
        "judges": judged,
        "pixels": result.pixels,
        "kid": {"backbone": kid, "pictures": len(pids_Q), "attackers": result.kid} if kid else None,
        "probe": _probe_history(protected, config),
        "training": training,
        "attack": {
            "seconds": round(sum(result.seconds.values()), 1),
            "people": max(result.people),
            "leaked": result.leaked,
            "notes": result.notes,
        },
        "notes": _notes(control, protected, result),
    }


def _notes(control: Path, protected: Path, result: SuiteResult) -> list[str]:
    notes = []
    if "perceptual" not in result.axes:
        notes.append("The axis perceptual is left out: attack.perceptual.lpips names no weights.")
    if load_run(protected).neighbourhood != load_run(control).neighbourhood:
        notes.append(
            "Control and protected differ in the neighbourhood loss, which makes people easier to match by itself: u "
            "counts what it buys. Attack with a control that was trained by it, too, to see what the protection costs."
        )
    return notes


def _protocol(
    config: Config,
    control: Path,
    protected: Path,
    result: SuiteResult,
    judges: dict[str, dict[str, Any]],
    pids_Q: np.ndarray,
) -> str:
    trained = read_json(control / "model" / "extractor.json")
    data = "synthetic people" if is_synthetic(config.data) else read_meta(Path(config.data.shards))["kind"]
    dims = {run: load_extractor(run / "model", "cpu").extractor.store.dim for run in (control, protected)}
    stored = f"{dims[control]}-d" + (f" (protected: {dims[protected]}-d)" if len(set(dims.values())) > 1 else "")
    height, width = config.reversal.size
    return " · ".join(
        [
            f"{data}, {trained['about']['identities']} training identities, seed {load_run(control).seed}",
            f"attackers: {max(result.people)} other people, {stored} features, pictures {height}×{width}; "
            f"and the features of all {result.leaked} entries of the stolen database",
            *(f"judge {judge['name']}, mAP {judge['mAP']:.2f} on real queries" for judge in judges.values()),
            f"{len(pids_Q)} queries of {len(np.unique(pids_Q))} identities"
            + (f", entries of up to {most} pictures" if (most := config.data.tracklet) > 1 else ""),
            f"identity bootstrap {config.attack.resamples} × 95 %",
        ]
    )


def _training(run: Path) -> dict[str, Any]:
    config, result = load_run(run), read_json(run / "result.json")
    names = " + ".join(f"{a.kind} × {a.weight:g}" for a in config.privacy.adversaries)
    method = f"λ {config.privacy.weight:g}: {names}" if config.privacy.weight else "unprotected"
    if config.neighbourhood.weight:
        method += f", neighbourhood × {config.neighbourhood.weight:g}"
    if (kept := config.model.store) != StoreConfig():
        method += f", stored as {stored_in_words(kept)}"
    wanted = ("steps", "images", "seconds", "images_per_second", "data_wait")
    return {**{key: result[key] for key in wanted}, "method": method}


def _probe_history(run: Path, config: Config) -> dict[str, Any] | None:
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "probe/fresh" in row]
    if not rows:
        return None
    history = [
        {
            "step": row["step"],
            "images": row["images"],
            "apparent": row.get("probe/apparent"),  # of a training without an opponent there is none
            "fresh": row["probe/fresh"],
        }
        for row in rows
    ]
    unit = "L1 on the person" if open_split(config.data, "aux").has_masks else "L1"
    newest = rows[-1]
    return {
        "apparent": newest.get("probe/apparent"),
        "fresh": newest["probe/fresh"],
        "gap": newest.get("probe/gap"),
        "warned": any(bool(row.get("probe/warned")) for row in rows),
        "history": history,
        "unit": unit,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
