"""What finished runs are asked: how well they match people, and what they leak.

DIR/                        of `ppreid attack --out DIR`
    trained/                every attacker's training, kept as soon as it is done: a stopped attack goes on from them
    attack.json             the report's figures and what the page needs beside them
    per_query.safetensors   the scores behind them: AXIS/ATTACKER/ROLE, a query picture each
    pictures.safetensors    a few query pictures and their reconstructions, by VICTIM/ATTACKER
    report.json, report.html, figures/      by `ppreid report DIR` (reporting/report.py)
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppreid_dist.attack_setup import set_up
from ppreid_dist.attacks.kept import source_digest
from ppreid_dist.attacks.suite import SuiteResult, help_suite, run_suite
from ppreid_dist.data.dataset import is_synthetic, load_split
from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.export import provenance, rank_split, rerank_split, save_split
from ppreid_dist.evaluation.tracklets import Enrolment
from ppreid_dist.experiment import Config, load_run
from ppreid_dist.files import check_writable, write_json, write_tensors
from ppreid_dist.findings import findings
from ppreid_dist.helpers import helping
from ppreid_dist.kernels.choice import using
from ppreid_dist.models.folder import load_extractor
from ppreid_dist.progress import note, progress_bar, say
from ppreid_dist.reporting.schema import check_report
from ppreid_dist.settings import to_dict
from ppreid_dist.transfer import default_device

if TYPE_CHECKING:
    from ppreid_dist.evaluation.reranking import Reranking


def evaluate(run: Path, *, reranking: "Reranking | None" = None, progress: bool = True) -> dict[str, float]:
    """mAP, CMC and mINP of a finished run on its query and gallery; writes RUN/evaluation.json and RUN/features/.

    With ``reranking`` the same after it too, under names that begin with ``reranked_``.
    """
    config, device = load_run(run), default_device()
    for folder in (run, run / "features"):
        check_writable(folder)  # or it would be known only when all is embedded
    saved = load_extractor(run / "model", device)
    query, gallery = (
        load_split(config.data, split, saved.size, device, progress=progress) for split in ("query", "gallery")
    )
    enrolment = Enrolment(config.data.tracklet)
    query_QD, gallery_GD = (enrolment.stored(saved.extractor, split) for split in (query, gallery))
    query, gallery = enrolment.heads(query), enrolment.heads(gallery)
    about = provenance(run / "model", saved.extractor.store.config)
    save_split(run / "features", "query", query_QD, query, about)
    save_split(run / "features", "gallery", gallery_GD, gallery, about)
    with using(config.kernels, device):
        summary = rank_split(query_QD, gallery_GD, query, gallery).summary()
    if reranking is not None:
        again = rerank_split(query_QD, gallery_GD, query, gallery, reranking).summary()
        summary |= {f"reranked_{name}": value for name, value in again.items()}
    write_json(run / "evaluation.json", summary)
    return summary


def attack(
    config: Config,
    control: Path,
    protected: Path,
    judges: Sequence[Path],
    out: Path,
    *,
    trained: Path | None = None,
    processes: int = 1,
    estimate: bool = True,
    progress: bool = True,
) -> None:
    """Attack two runs' stored features and write attack.json, per_query and pictures into ``out``.

    ``trained`` is where trainings are kept, ``out / "trained"`` by default: attacks of the same control share its
    ceilings and floors there, also while they run. ``processes`` of this machine train, each on a GPU of its own
    where there are several. ``estimate``: say first how long it may take, which itself takes a while.
    ``judges`` are runs and .onnx files; the first one's axis is ``identity``.

    Raises RunError where the runs can't be compared (:func:`ppreid_dist.attack_setup.set_up`).
    """
    runs, kept = (control, protected, judges), trained or out / "trained"
    for folder in (kept, out):
        check_writable(folder)  # or it would be known only when the first attacker has been trained
    setup = set_up(config, *runs, kept, progress=progress)
    help_us = helping(processes - 1, partial(_help, config, *runs, kept))
    with (
        using(config.kernels, default_device()),
        help_us,
        progress_bar(shown=progress, desc="attack", unit=" training") as bar,
    ):

        def found(line: str) -> None:
            bar.update()
            say(f"  {line}")

        result = run_suite(
            setup.bench(progress=partial(note, bar), found=found),
            **setup.victims,
            auxiliaries=setup.auxiliaries,
            processes=processes,
            announce=(lambda line: say(f"attack: {line}")) if progress and estimate else None,
        )
    figures = findings(config, control, protected, setup.judges, result, setup.rankings, setup.query.pids_N)
    check_report(figures, str(out / "attack.json"))
    _write_found(
        out,
        figures,
        result,
        setup.query,
        {"synthetic": is_synthetic(config.data), "settings": to_dict(config.report), "source": source_digest()},
    )


def _help(config: Config, control: Path, protected: Path, judges: Sequence[Path], kept: Path) -> None:
    """What another process of the same attack does."""
    with using(config.kernels, default_device()):
        setup = set_up(config, control, protected, judges, kept)
        help_suite(setup.bench(progress=lambda line: None), **setup.victims, auxiliaries=setup.auxiliaries)


def _write_found(
    out: Path, figures: Mapping[str, Any], result: SuiteResult, query: Pictures, beside: Mapping[str, Any]
) -> None:
    """attack.json last: where it is, the others are, of the same attack."""
    (out / "attack.json").unlink(missing_ok=True)
    pictures = {f"{victim}/{name}": drawn for (victim, name), drawn in result.reconstructions.items()}
    pictures["real"] = query.images_N3HW[torch.from_numpy(result.shown)]
    per_query = {"/".join(key): torch.from_numpy(values) for key, values in result.per_query.items()}
    write_tensors(out / "pictures.safetensors", pictures)
    write_tensors(out / "per_query.safetensors", per_query)
    attackers = {"protected": result.strongest["protected"], "control": result.strongest["control"]}
    write_json(out / "attack.json", {"report": figures, "strongest": attackers, **beside})
