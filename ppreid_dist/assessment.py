"""What finished runs are asked: how well they match people, what they leak, and the report of both.

DIR/                        of `ppreid attack --out DIR`
    trained/                every attacker's training, kept as soon as it is done: a stopped attack goes on from them
    attack.json             the report's figures and what the page needs beside them
    per_query.safetensors   the scores behind them: AXIS/ATTACKER/ROLE, a query picture each
    pictures.safetensors    a few query pictures and their reconstructions, by VICTIM/ATTACKER
    report.json, report.html, figures/      by `ppreid report DIR`
"""

import os
import platform
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ppreid_dist import __version__
from ppreid_dist.attacks.adaptive import TURNED, for_stored, trained_generator
from ppreid_dist.attacks.kept import Kept
from ppreid_dist.attacks.suite import SuiteResult, Victim, run_suite
from ppreid_dist.data.dataset import open_split
from ppreid_dist.data.stream import Pictures, load_pictures
from ppreid_dist.errors import ConfigError, RunError
from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.export import rank_split, save_features, stored_features
from ppreid_dist.evaluation.ranking import Ranking
from ppreid_dist.experiment import FREE, Config, flat, load_run
from ppreid_dist.models.folder import SavedExtractor, load_extractor
from ppreid_dist.models.generator import Generator
from ppreid_dist.models.store import Store, StoreConfig
from ppreid_dist.reporting.page import Panel, write_report
from ppreid_dist.reporting.schema import SCHEMA, check_report
from ppreid_dist.settings import to_dict
from ppreid_dist.storage import read_json, read_tensors, write_json, write_tensors
from ppreid_dist.training.reversal import resize
from ppreid_dist.training.tracking import read_metrics

# Control and protected must be the same training but for these.
METHOD = ("privacy.", "reversal.", "data.strangers_split", "training.warm", "model.store.")


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _pictures(config: Config, split: str, size: tuple[int, int], device: torch.device, progress: bool) -> Pictures:
    backend = config.data.stream.backend
    return load_pictures(open_split(config.data, split), size, backend=backend, device=device, progress=progress)


def evaluate(run: Path, *, progress: bool = True) -> dict[str, float]:
    """mAP, CMC and mINP of a finished run on its query and gallery; writes RUN/evaluation.json and RUN/features/."""
    config, device = load_run(run), default_device()
    saved = load_extractor(run / "model", device)
    query, gallery = (_pictures(config, split, saved.size, device, progress) for split in ("query", "gallery"))
    query_QD, gallery_GD = (stored_features(saved.extractor, split.images_N3HW) for split in (query, gallery))
    save_features(run / "features", "query", query_QD, query)
    save_features(run / "features", "gallery", gallery_GD, gallery)
    summary = rank_split(query_QD, gallery_GD, query, gallery).summary()
    write_json(run / "evaluation.json", summary)
    return summary


# --- attack -----------------------------------------------------------------------------------------------------


def attack(
    config: Config,
    control: Path,
    protected: Path,
    judge: Path,
    out: Path,
    *,
    trained: Path | None = None,
    progress: bool = True,
) -> None:
    """Attack two runs' stored features and write attack.json, per_query and pictures into ``out``.

    ``trained`` is where trainings are kept, ``out / "trained"`` by default: several runs of the same control share its
    ceilings and floors there.

    Raises RunError where the runs can't be compared: control and protected must be the same training but for the
    protection, the judge another run than both, the auxiliary people unknown to control and protected.
    """
    device = default_device()
    _check_comparable(control, protected, judge)
    judging = load_extractor(judge / "model", device)
    size = config.reversal.size
    aux, query = (_pictures(config, split, size, device, progress) for split in ("aux", "query"))
    gallery = _pictures(config, "gallery", judging.size, device, progress)

    def look(images_N3hw: Tensor) -> Tensor:
        return stored_features(judging.extractor, resize(images_N3hw.float(), judging.size).clamp(0, 1))

    sizes: dict[tuple[int, int], dict[str, Pictures]] = {}
    victims, rankings = {}, {}
    for role, run in (("control", control), ("protected", protected)):
        saved = load_extractor(run / "model", device)
        if saved.size not in sizes:
            sizes[saved.size] = {
                split: _pictures(config, split, saved.size, device, progress) for split in ("aux", "query", "gallery")
            }
        victims[role], rankings[role] = _victim(role, saved, sizes[saved.size])
    stored = (sizes[saved.size]["aux"], victims["protected"].aux_ND)
    victims["protected"] = replace(victims["protected"], reversal=_reversal(protected, size, device, *stored))
    with tqdm(disable=not progress, desc="attack", unit=" training") as bar:

        def found(line: str) -> None:
            bar.update()
            tqdm.write(f"  {line}")

        result = run_suite(
            aux=aux,
            query=query,
            gallery_judged_GD=stored_features(judging.extractor, gallery.images_N3HW),
            gallery_pids=gallery.pids_N,
            gallery_camids=gallery.camids_N,
            control=victims["control"],
            protected=victims["protected"],
            judge=look,
            config=config.attack,
            progress=bar.set_postfix_str,
            found=found,
            kept=Kept(trained or out / "trained"),
        )
    figures = _figures(config, control, protected, judge, result, rankings, query.pids_N)
    check_report(figures, str(out / "attack.json"))
    pictures = {f"{victim}/{name}": drawn for (victim, name), drawn in result.reconstructions.items()}
    pictures["real"] = query.images_N3HW[torch.from_numpy(result.shown)]
    for name, tensors in (
        ("pictures", pictures),
        ("per_query", {"/".join(key): torch.from_numpy(values) for key, values in result.per_query.items()}),
    ):
        write_tensors(out / f"{name}.safetensors", tensors)
    beside = {"synthetic": config.data.kind == "synthetic", "settings": to_dict(config.report)}
    attackers = {"protected": result.strongest["protected"], "control": result.strongest["control"]}
    write_json(out / "attack.json", {"report": figures, "strongest": attackers, **beside})


def _reversal(
    run: Path, size: tuple[int, int], device: torch.device, aux: Pictures, stored_NS: Tensor
) -> Generator | None:
    """The generator that the run was trained against, if it draws pictures of this size, for what the run stores."""
    config = load_run(run)
    if tuple(config.reversal.size) != tuple(size):
        return None
    if (generator := trained_generator(run, config.reversal)) is None:
        return None
    generator = generator.to(device)
    if config.model.store.kind not in TURNED:
        return generator
    plain = load_extractor(run / "model", device).extractor
    plain.store = Store(StoreConfig(), plain.feature_dim)
    plain_ND = stored_features(plain, aux.images_N3HW)
    return for_stored(generator, stored_NS, plain_ND, aux.pids_N, seed=config.seed)


def _victim(role: str, saved: SavedExtractor, pictures: dict[str, Pictures]) -> tuple[Victim, Ranking]:
    features = {split: stored_features(saved.extractor, of.images_N3HW) for split, of in pictures.items()}
    ranking = rank_split(features["query"], features["gallery"], pictures["query"], pictures["gallery"])

    def see(images_B3hw: Tensor) -> Tensor:
        stored_BD: Tensor = saved.extractor(resize(images_B3hw, saved.size)).stored_BD
        return stored_BD

    return Victim(
        name=role, aux_ND=features["aux"], query_QD=features["query"], utility_ap_Q=ranking.ap_Q, see=see
    ), ranking


def _check_comparable(control: Path, protected: Path, judge: Path) -> None:
    if len({run.resolve() for run in (control, protected, judge)}) < 3:
        raise RunError(f"{judge}: control, protected and judge must be three different runs")
    settings = {run: dict(flat(to_dict(load_run(run)))) for run in (control, protected, judge)}
    for key, value in settings[control].items():
        other = settings[protected][key]
        if not key.startswith((*METHOD, *FREE)) and value != other:
            raise RunError(f"{control}: not the control of {protected}: {key} is {value!r} there and {other!r} here")
    if settings[control]["privacy.weight"]:
        raise RunError(f"{control}: not a control: its privacy.weight is {settings[control]['privacy.weight']}")
    for run, role in ((control, "control"), (judge, "judge")):
        if (kind := settings[run]["model.store.kind"]) != "plain":
            raise RunError(f"{run}: not a {role}: its features are stored as {kind}")
    for run in (control, protected):
        if "aux" in settings[run]["data.train_splits"]:
            raise RunError(f"{run}: trained on the attackers' people (data.train_splits names aux)")
    if settings[judge]["seed"] == settings[protected]["seed"]:
        raise ConfigError(f"seed: {judge} has the seed of {protected}; a judge of its own mind needs another")


def _figures(
    config: Config,
    control: Path,
    protected: Path,
    judge: Path,
    result: SuiteResult,
    rankings: dict[str, Ranking],
    pids_Q: np.ndarray,
) -> dict[str, Any]:
    ranking = rankings["protected"]
    bootstrap = Bootstrap(pids_Q, config.attack.resamples, config.attack.seed, 0.95)
    of, over = bootstrap.means({"protected": ranking.ap_Q, "control": rankings["control"].ap_Q})
    ratio = bootstrap.interval(of / over)
    training = {name: _training(run) for name, run in (("control", control), ("protected", protected))}
    return {
        "schema": SCHEMA,
        "protocol": _protocol(config, control, judge, result, pids_Q),
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
        },
        "axes": result.axes,
        "attributes": result.attributes,
        "whitebox": result.whitebox,
        "linkage": result.linkage,
        "judge": {
            "name": f"{load_run(judge).model.backbone}, seed {load_run(judge).seed}",
            "mAP": result.judge["mAP"],
            "rank1": result.judge["rank1"],
            "note": "An extractor of ours, trained apart from both runs; it looks at pictures of the attackers' size.",
        },
        "probe": _probe_history(protected, config),
        "training": training,
        "attack": {
            "seconds": round(sum(result.seconds.values()), 1),
            "people": max(result.people),
            "notes": result.notes,
        },
        "notes": [],
    }


def _protocol(config: Config, control: Path, judge: Path, result: SuiteResult, pids_Q: np.ndarray) -> str:
    trained = read_json(control / "model" / "extractor.json")
    data = "synthetic people" if config.data.kind == "synthetic" else config.data.kind
    dim = load_extractor(control / "model", "cpu").extractor.store.dim
    height, width = config.reversal.size
    return " · ".join(
        [
            f"{data}, {trained['about']['identities']} training identities, seed {load_run(control).seed}",
            f"attackers: {max(result.people)} other people, {dim}-d L2-normalised features, pictures {height}×{width}",
            f"judge {Path(load_run(judge).model.backbone).name}, mAP {result.judge['mAP']:.2f} on real queries",
            f"{len(pids_Q)} queries of {len(np.unique(pids_Q))} identities",
            f"identity bootstrap {config.attack.resamples} × 95 %",
        ]
    )


def _training(run: Path) -> dict[str, Any]:
    config, result = load_run(run), read_json(run / "result.json")
    names = " + ".join(f"{a.kind} × {a.weight:g}" for a in config.privacy.adversaries)
    method = f"λ {config.privacy.weight:g}: {names}" if config.privacy.weight else "unprotected"
    if (kept := config.model.store) != StoreConfig():
        method += f", stored as {kept.kind}" + (", int8" if kept.quantise == "int8" else "")
    wanted = ("steps", "images", "seconds", "images_per_second", "data_wait")
    return {**{key: result[key] for key in wanted}, "method": method}


def _probe_history(run: Path, config: Config) -> dict[str, Any] | None:
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "probe/apparent" in row]
    if not rows:
        return None
    history = [
        {"step": row["step"], "images": row["images"], "apparent": row["probe/apparent"], "fresh": row["probe/fresh"]}
        for row in rows
    ]
    unit = "L1 on the person" if open_split(config.data, "aux").has_masks else "L1"
    newest = rows[-1]
    return {
        "apparent": newest["probe/apparent"],
        "fresh": newest["probe/fresh"],
        "gap": newest["probe/gap"],
        "warned": any(bool(row["probe/warned"]) for row in rows),
        "history": history,
        "unit": unit,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


# --- report -----------------------------------------------------------------------------------------------------


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
    return Panel(
        real_K3hw=drawn["real"][:people],
        control_K3hw=drawn[f"control/{attacker}"][:people],
        protected_K3hw=drawn[f"protected/{attacker}"][:people],
        attacker=attacker,
        note=f"The first query picture of the first {people} test people" + (", all synthetic." if synthetic else "."),
    )
