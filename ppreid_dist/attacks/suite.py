"""All attackers against two sets of stored features: what the protected ones leak of what unprotected ones do.

Every attacker is trained three times for each number of people: on the control's features (its ceiling), on the
protected ones, and on the control's features with the pictures of other people (its floor: what it makes of the prior
alone). Each is tested on people it has never seen, on two axes: pixels of the person, and identity, by whether an
independent ReID model finds the person from the reconstruction.

Shapes: N auxiliary pictures, Q query pictures, G gallery pictures, D feature dim, h w pixels.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.base import ATTACKERS, HELD_OUT_PEOPLE, Progress, to_float
from ppreid_dist.attacks.gan import GanConfig
from ppreid_dist.attacks.regression import RegressionConfig
from ppreid_dist.attacks.retrieval import RetrievalConfig
from ppreid_dist.attacks.ridge import RidgeConfig
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.images import scores
from ppreid_dist.evaluation.ranking import Ranking, rank_queries
from ppreid_dist.evaluation.urr import AttackScores, AxisResult, attack_curve, urr
from ppreid_dist.settings import Settings, option

AXES = {"pixel": "SSIM on the person", "identity": "mAP of an independent ReID model"}
SHOWN = 12  # identities whose reconstructions are kept
WEAK_JUDGE = 3.0  # times chance


@dataclass(kw_only=True)
class AttackConfig(Settings):
    attackers: list[str] = option(
        ["retrieval", "ridge", "regression", "gan"], "who attacks", choices=tuple(ATTACKERS)
    )
    curve_attackers: list[str] = option(
        ["ridge", "regression"], "who attacks with fewer people too", choices=tuple(ATTACKERS)
    )
    people: list[int] = option(
        [80, 160, 320, 0], "numbers of the attackers' own people; 0 is all, and more than there are is all", at_least=0
    )
    resamples: int = option(2000, "bootstrap resamples of the identities", at_least=10)
    seed: int = option(0, "everything is drawn from it", at_least=0)
    retrieval: RetrievalConfig = option(RetrievalConfig(), "")
    ridge: RidgeConfig = option(RidgeConfig(), "")
    regression: RegressionConfig = option(RegressionConfig(), "")
    gan: GanConfig = option(GanConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attackers:
            raise ConfigError("attackers: at least one must be named")
        if strangers := set(self.curve_attackers) - set(self.attackers):
            raise ConfigError(f"curve_attackers: {min(strangers)} is not one of the attackers")
        if not self.people:
            raise ConfigError("people: at least one number must be given")


@dataclass(frozen=True, kw_only=True)
class Victim:
    """An extractor as its attackers meet it: stored features of the auxiliary and the query pictures.

    ``utility_ap_Q`` is the average precision of its own queries, NaN where a query has no positive.
    """

    name: str
    aux_ND: Tensor
    query_QD: Tensor
    utility_ap_Q: np.ndarray


class Judge(Protocol):
    """An independent ReID model: float pictures (N,3,h,w) in [0,1] to features (N,D)."""

    def __call__(self, images_N3hw: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One attacker, trained once and tested on every query picture."""

    pixel_Q: np.ndarray
    identity_Q: np.ndarray
    l1: float
    psnr: float
    seconds: float
    shown: Tensor  # uint8 (SHOWN or fewer,3,h,w): the rows ``Bench.shown``


Trained = dict[tuple[str, int], Outcome]  # by attacker and number of people


@dataclass(frozen=True, kw_only=True)
class Control:
    """What doesn't depend on the protected extractor, and serves every one of the same data and settings."""

    ceiling: Trained
    floor: Trained


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """``axes`` is JSON-ready: metric, leak, urr, attackers, curve and n50 of every axis.

    ``reconstructions`` holds uint8 pictures by (victim's name, attacker), of the query rows ``shown``;
    ``strongest`` the attacker that found most people, by victim's name. ``per_query`` holds the scores behind the
    axes, by (axis, attacker, "control" | "protected" | "floor"), ``means`` L1 and PSNR by (role, attacker),
    all at the largest number of people. ``seconds`` is the training time of each attacker, over all trainings.
    """

    axes: dict[str, dict[str, Any]]
    judge: dict[str, float]
    notes: list[str]
    people: list[int]
    seconds: dict[str, float]
    shown: np.ndarray
    reconstructions: dict[tuple[str, str], Tensor]
    strongest: dict[str, str]
    per_query: dict[tuple[str, str, str], np.ndarray]
    means: dict[tuple[str, str], dict[str, float]]


class Bench:
    """What attackers are trained on and tested by; the same for every victim."""

    def __init__(
        self,
        *,
        aux: Pictures,
        query: Pictures,
        gallery_judged_GD: Tensor,
        gallery_pids: np.ndarray,
        gallery_camids: np.ndarray,
        judge: Judge,
        config: AttackConfig,
        progress: Progress,
    ):
        self.aux, self.query, self.judge, self.config, self.progress = aux, query, judge, config, progress
        self.gallery = gallery_judged_GD, gallery_pids, gallery_camids
        people = np.unique(aux.pids_N)
        if len(people) < 2 * HELD_OUT_PEOPLE:
            raise ConfigError(
                f"attack.people: {len(people)} auxiliary people are too few, an attacker needs {2 * HELD_OUT_PEOPLE}"
            )
        if 0 < min(n or len(people) for n in config.people) < 2 * HELD_OUT_PEOPLE:
            raise ConfigError(f"attack.people: {min(filter(None, config.people))} is less than {2 * HELD_OUT_PEOPLE}")
        self.order = np.random.default_rng([config.seed, 0xA0]).permutation(people)
        self.people = sorted({min(n or len(people), len(people)) for n in config.people})
        self.shown = np.unique(query.pids_N, return_index=True)[1][:SHOWN]

    def rank(self, images_Q3hw: Tensor) -> Ranking:
        """How the judge finds the query people, from these pictures of them, in the gallery of real pictures."""
        with torch.no_grad():
            judged_QD = torch.cat([self.judge(to_float(part)) for part in images_Q3hw.split(256)])
        features_GD, pids, camids = self.gallery
        return rank_queries(
            judged_QD,
            features_GD.to(judged_QD.device),
            query_pids=self.query.pids_N,
            gallery_pids=pids,
            query_camids=self.query.camids_N,
            gallery_camids=camids,
        )

    def train_all(self, role: str, aux_ND: Tensor, query_QD: Tensor, *, permuted: bool = False) -> Trained:
        """Every attacker with every number of people on these features, or on those of permuted people."""
        trained: Trained = {}
        for n in self.people:
            rows = np.flatnonzero(np.isin(self.aux.pids_N, self.order[:n]))
            pairs = permute_people(self.aux.pids_N[rows], self.config.seed) if permuted else np.arange(len(rows))
            for name in self.config.attackers if n == self.people[-1] else self.config.curve_attackers:
                label = f"{name}, {n} people, {role}"
                outcome = self._train(label, name, aux_ND[rows], rows, rows[pairs], query_QD)
                trained[name, n] = outcome
                self.progress(
                    f"{label}: SSIM {np.nanmean(outcome.pixel_Q):.3f}, mAP {np.nanmean(outcome.identity_Q):.3f}, "
                    f"{outcome.seconds:.1f} s"
                )
        return trained

    def _train(
        self, label: str, name: str, features_ND: Tensor, rows: np.ndarray, pictured: np.ndarray, query_QD: Tensor
    ) -> Outcome:
        started = time.monotonic()
        attacker = ATTACKERS[name](getattr(self.config, name))
        attacker.fit(
            features_ND,
            self.aux.images_N3HW[pictured],
            self.aux.pids_N[rows],
            seed=self.config.seed,
            progress=partial(_labelled, self.progress, label),
        )
        # As stored pictures: uint8, so that nothing is read off digits no picture has.
        drawn_Q3hw = torch.cat([_to_uint8(attacker.reconstruct(part)) for part in query_QD.split(512)])
        seconds = time.monotonic() - started
        pixel = scores(drawn_Q3hw, self.query.images_N3HW, self.query.masks_N1HW)
        return Outcome(
            pixel_Q=pixel["ssim"],
            identity_Q=self.rank(drawn_Q3hw).ap_Q,
            l1=float(np.nanmean(pixel["l1"])),
            psnr=float(np.nanmean(pixel["psnr"])),
            seconds=seconds,
            shown=drawn_Q3hw[self.shown].cpu(),
        )


def _labelled(progress: Progress, label: str, line: str) -> None:
    progress(f"{label}: {line}")


def _to_uint8(images_N3hw: Tensor) -> Tensor:
    return (images_N3hw * 255).round().to(torch.uint8)


def permute_people(pids_N: np.ndarray, seed: int) -> np.ndarray:
    """For every row the row of a picture of another person: identities go round a random circle.

    All features of one person get pictures of one other person, so that what the pairs teach is the prior alone, and
    a split by identity is one of the pictured people too.
    """
    circle = np.random.default_rng([seed, 0xF1]).permutation(np.unique(pids_N))
    pairs = np.empty(len(pids_N), dtype=np.int64)
    for pid, other in zip(circle, np.roll(circle, 1), strict=True):
        mine, theirs = np.flatnonzero(pids_N == pid), np.flatnonzero(pids_N == other)
        pairs[mine] = np.resize(theirs, len(mine))
    return pairs


def chance_ap(positives: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The mean average precision of a random ranking with so many positives (at least 1) among so many candidates.

    Exact: an item at rank k is a positive with chance R/N, and then each of the k − 1 before it with (R − 1)/(N − 1).
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, candidates.max() + 1))])[candidates]
    others = (positives - 1) / np.maximum(candidates - 1, 1)
    return (harmonic + others * (candidates - harmonic)) / candidates


def attack_control(bench: Bench, control: Victim) -> Control:
    """The ceilings and floors, which every protected extractor of the same data can be compared with."""
    train = partial(bench.train_all, aux_ND=control.aux_ND, query_QD=control.query_QD)
    return Control(ceiling=train("unprotected"), floor=train("prior only", permuted=True))


def run_suite(
    *,
    aux: Pictures,
    query: Pictures,
    gallery_judged_GD: Tensor,
    gallery_pids: np.ndarray,
    gallery_camids: np.ndarray,
    control: Victim,
    protected: Victim,
    judge: Judge,
    config: AttackConfig,
    progress: Callable[[str], None],
) -> SuiteResult:
    """Attack both victims and put the leak in figures.

    ``gallery_judged_GD`` are the judge's features of the real gallery pictures. Features and pictures lie on one
    device. Raises ConfigError naming ``attack.people`` where there are too few auxiliary people.
    """
    bench = Bench(
        aux=aux,
        query=query,
        gallery_judged_GD=gallery_judged_GD,
        gallery_pids=gallery_pids,
        gallery_camids=gallery_camids,
        judge=judge,
        config=config,
        progress=progress,
    )
    reference = attack_control(bench, control)
    trained = bench.train_all("protected", protected.aux_ND, protected.query_QD)
    return summarise(bench, control, protected, reference, trained)


def summarise(
    bench: Bench, control: Victim, protected: Victim, reference: Control, trained: Trained
) -> SuiteResult:
    """Ratios, curves and notes of what was trained."""
    config, largest = bench.config, bench.people[-1]
    roles = {"control": reference.ceiling, "protected": trained, "floor": reference.floor}
    last = {name: (name, largest) for name in config.attackers}
    real, notes = judge_quality(bench)
    if dropped := sorted(n for n in config.people if n > largest):
        notes.append(f"attack.people: there are {largest} auxiliary people, {dropped} stands for all of them")
    victims = {control.name: reference.ceiling, protected.name: trained}
    return SuiteResult(
        axes={axis: _axis(axis, bench, control, protected, roles) for axis in AXES},
        judge=real,
        notes=notes,
        people=bench.people,
        seconds={
            name: sum(o.seconds for role in roles.values() for (who, _), o in role.items() if who == name)
            for name in config.attackers
        },
        shown=bench.shown,
        reconstructions={
            (victim, name): runs[key].shown for victim, runs in victims.items() for name, key in last.items()
        },
        strongest={
            victim: max(last, key=lambda name: float(np.nanmean(runs[last[name]].identity_Q)))  # noqa: B023
            for victim, runs in victims.items()
        },
        per_query={
            (axis, name, role): getattr(runs[key], f"{axis}_Q")
            for axis in AXES
            for role, runs in roles.items()
            for name, key in last.items()
        },
        means={
            (role, name): {"l1": runs[key].l1, "psnr": runs[key].psnr}
            for role, runs in roles.items()
            for name, key in last.items()
        },
    )
