"""The judges of an attack: finished runs and ONNX files, checked and opened.

An extractor that had a part in the attack, or that is another judge once more, would be no second opinion.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ppreid_dist.attacks.judging import Judge, Look
from ppreid_dist.data.dataset import DataConfig, open_training
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError, RunError
from ppreid_dist.evaluation.export import stored_features
from ppreid_dist.experiment import load_run
from ppreid_dist.files import read_json
from ppreid_dist.models.folder import load_extractor
from ppreid_dist.models.onnx_model import OnnxConfig, OnnxModel
from ppreid_dist.pixels import resize

Gallery = Callable[[tuple[int, int]], Pictures]  # the gallery's pictures at a size


def is_onnx(judge: Path) -> bool:
    return judge.suffix == ".onnx"


def check_unseen(run: Path) -> None:
    """RunError where the run was trained on the people who are tested: it knows them by heart."""
    if seen := [split for split in load_run(run).data.train_splits if split in ("query", "gallery")]:
        raise RunError(f"{run}: trained on the people who are tested (data.train_splits names {seen[0]})")


def check_judges(judges: Sequence[Path], protected: Path) -> None:
    """RunError or ConfigError naming the run that is stored otherwise than plain, was trained with a privacy loss or on
    the tested people, has the seed of ``protected``, or has seed and backbone of another judge."""
    runs = {judge: load_run(judge) for judge in judges if not is_onnx(judge)}
    for judge, config in runs.items():
        if (how := config.model.store.in_words) != "plain":
            raise RunError(f"{judge}: not a judge: its features are stored as {how}")
        if config.privacy.weight:
            raise RunError(f"{judge}: not a judge: its privacy.weight is {config.privacy.weight:g}; it may be blind")
        check_unseen(judge)
        if config.seed == load_run(protected).seed:
            raise ConfigError(f"seed: {judge} has the seed of {protected}; an independent judge needs another")
    for (one, its), (other, others) in combinations(runs.items(), 2):
        if (its.seed, its.model.backbone) == (others.seed, others.model.backbone):
            raise ConfigError(
                f"seed: {other} has seed and backbone of {one}; an independent judge needs another of either"
            )


def check_judges_pictures(judges: Sequence[Path], data: DataConfig) -> None:
    """RunError naming the run that was trained on ``data``'s shards when others were tested: under another
    ``split_seed``, tested people may have been among its own. Of other shards nothing is known."""
    for judge in judges:
        if is_onnx(judge):
            continue
        its = load_run(judge).data
        if Path(its.shards).resolve() != Path(data.shards).resolve():
            continue
        known = read_json(judge / "model" / "extractor.json").get("about", {}).get("training pictures")
        if known != open_training(replace(data, train_splits=its.train_splits)).fingerprint:
            raise RunError(
                f"{judge}: not a judge: {data.shards} (data.shards) held other people in "
                f"{', '.join(its.train_splits)} when it was trained"
            )


def open_judges(judges: Sequence[Path], onnx: OnnxConfig, gallery: Gallery, device: torch.device) -> list[Judge]:
    """Every judge with what it sees of the gallery; RunError naming the one that can't judge."""
    models = {judge: OnnxModel(judge, onnx, device) for judge in judges if is_onnx(judge)}
    for (one, its), (other, others) in combinations(models.items(), 2):
        if its.digest == others.digest:
            raise RunError(f"{other}: the same model as {one}; an independent judge is another model")
    return [
        _file_judge(models[judge], gallery) if judge in models else _run_judge(judge, gallery, device)
        for judge in judges
    ]


def _file_judge(model: OnnxModel, gallery: Gallery) -> Judge:
    note = f"An ONNX model, SHA-256 {model.digest[:16]}…; what it was trained on is for its user to know."
    return _judge(model.file.name, note, model.size, model, gallery)


def _run_judge(run: Path, gallery: Gallery, device: torch.device) -> Judge:
    config, saved = load_run(run), load_extractor(run / "model", device)
    note = "An extractor of ours, trained apart from both runs; it looks at pictures of the attackers' size."
    name = f"{Path(config.model.backbone).name}, seed {config.seed}"
    return _judge(name, note, saved.size, partial(stored_features, saved.extractor), gallery)


def _judge(name: str, note: str, size: tuple[int, int], features: Look, gallery: Gallery) -> Judge:
    """``features`` takes pictures of ``size``, uint8 too; a judge takes any."""

    def look(images_N3hw: Tensor) -> Tensor:
        return features(resize(images_N3hw, size).clamp(0, 1))

    return Judge(name=name, look=look, gallery_GD=features(gallery(size).images_N3HW), note=note)
