"""Attackers trained and tested: the subsets of people, and one attacker's scores on the query pictures.

Shapes: N auxiliary pictures, Q query pictures, G gallery pictures, L leaked entries, D feature dim, h w pixels.
"""

import copy
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.adaptive import Adaptive
from ppreid_dist.attacks.base import (
    ATTACKERS,
    HELD_OUT_PEOPLE,
    SHOWN,
    Attacker,
    Outcome,
    Progress,
    permute_people,
    to_uint8,
)
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.judging import Judge, chance_of, identity_axes
from ppreid_dist.attacks.kept import Kept, digest, source_digest
from ppreid_dist.attacks.layout import Layout
from ppreid_dist.attacks.linkage import Stored
from ppreid_dist.attacks.perceptual import Perception, PerceptualConfig
from ppreid_dist.attacks.plateau import Learner, Split
from ppreid_dist.attacks.recogniser import Recogniser
from ppreid_dist.attacks.recognisers import Recognisers, asked_widths
from ppreid_dist.attacks.unfolded import Own, positions
from ppreid_dist.attacks.waves import are_bits
from ppreid_dist.attacks.whitebox import See
from ppreid_dist.attacks.work import Training, Work
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError, DataError
from ppreid_dist.evaluation.images import scores
from ppreid_dist.models.generator import Generator
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import to_dict

OPENED = 2  # databases of codes at a time whose positions are kept: each keeps its codes too


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What white-box attackers make of stored features by whatever key the extractor has, and what they compare with
    it: pictures of the attackers' size to the same, differentiable."""

    aux_ND: Tensor
    query_QD: Tensor
    see: See


@dataclass(frozen=True, kw_only=True)
class Victim:
    """An extractor as its attackers meet it: stored features of the auxiliary and the query pictures.

    ``utility_ap_Q`` is the average precision of its own queries, NaN where a query has no positive, ``cosine_ap_Q`` the
    same without re-ranking, where it re-ranks (``attack.rerank``). ``see`` is the
    extractor itself, for white-box attackers: pictures of the attackers' size to stored features; ``opened``, where its
    key uncovers something behind those, that. ``reversal`` is the generator that it was trained against, for the
    adaptive one. ``rekeyed`` is what it would store of both under another key, where there is one. ``leaked_LD`` are
    the other entries of the stolen database, of which attackers have no pictures.
    """

    name: str
    aux_ND: Tensor
    query_QD: Tensor
    utility_ap_Q: np.ndarray
    see: See
    opened: Opened | None = None
    reversal: Generator | None = None
    rekeyed: Stored | None = None
    leaked_LD: Tensor | None = None
    cosine_ap_Q: np.ndarray | None = None


Trained = dict[tuple[str, int], Outcome]  # by attacker and number of people


@dataclass(frozen=True, kw_only=True)
class Role:
    """What attackers are trained on: these features, or those of permuted people, and for whom; ``leaked_LD`` is the
    whole stolen database, the queries' features first."""

    name: str
    aux_ND: Tensor
    query_QD: Tensor
    leaked_LD: Tensor
    reversal: Generator | None = None
    permuted: bool = False


class Bench:
    """What attackers are trained on and tested by; the same for every victim.

    ``mean_picture_Q`` is the SSIM of the mean of all own pictures: what drawing without looking at features reaches.
    ``work`` makes the trainings, or takes them from ``kept``: it is the same for all that learn on other pictures too.
    """

    def __init__(
        self,
        *,
        aux: Pictures,
        query: Pictures,
        gallery_pids: np.ndarray,
        gallery_camids: np.ndarray,
        judges: Sequence[Judge],
        config: AttackConfig,
        progress: Progress,
        perception: Perception | None = None,
        found: Progress | None = None,
        kept: Kept | None = None,
    ):
        """The pids and camids are those of the gallery that the ``judges`` know. ``progress`` hears how trainings go,
        ``found`` what each one that is over has found. ConfigError naming ``attack.people`` where there are too few,
        DataError where a single person is tested."""
        self._positions: dict[str, Layout | None] = {}  # by what they are of
        self.aux, self.query, self.config, self.progress = aux, query, config, progress
        if len(tested := np.unique(query.pids_N)) < 2:
            raise DataError(f"query: {len(tested)} person; an interval over people needs at least 2")
        self.perception = perception or Perception(PerceptualConfig(), query.images_N3HW.device)
        self.gallery, self.judges = (gallery_pids, gallery_camids), identity_axes(judges)
        self.chance_Q = chance_of(query, *self.gallery)
        self.axes = {
            "pixel": "SSIM on the person",
            **{axis: f"mAP of the judge {judge.name}" for axis, judge in self.judges.items()},
            **self.perception.axes,
        }
        self.work = Work(kept, axes=self.axes, progress=progress, found=found or progress)
        self.real_QD = self.perception.features(query.images_N3HW)
        # Whoever lacks a library or a backbone says so before anybody is trained.
        others = config.auxiliary.attackers if config.auxiliary.variants else []
        asking = any([self.attacker(name).asks_recogniser for name in (*config.attackers, *others)])
        self.recognisers = Recognisers(config, kept, say=self.say, found=self.work.found) if asking else None
        self.shown = np.unique(query.pids_N, return_index=True)[1][:SHOWN]
        tests = [query.images_N3HW, query.pids_N, query.camids_N, *self.gallery]
        tests += [*(judge.gallery_GD for judge in judges), *self.perception.weights]
        masks = [] if query.masks_N1HW is None else [query.masks_N1HW]
        self.tests = digest(source_digest(), *tests, *masks)
        self._learn_on(aux, aux.pids_N, "attack.people")

    def learning_on(self, aux: Pictures, config: AttackConfig, *, where: str, by_picture: bool) -> "Bench":
        """The same tests for attackers who learn on other pictures, and, ``by_picture``, hold out pictures instead of
        people. ConfigError that begins with ``where`` if there are too few people."""
        other = copy.copy(self)
        other.aux, other.config = aux, config
        other._learn_on(aux, np.arange(len(aux.pids_N)) if by_picture else aux.pids_N, where)
        return other

    def _learn_on(self, aux: Pictures, groups_N: np.ndarray, where: str) -> None:
        """``groups_N``: pictures of one group are held out together, and permuted together for the floor."""
        config, people, least = self.config, np.unique(aux.pids_N), 2 * HELD_OUT_PEOPLE
        if len(people) < least:
            raise ConfigError(f"{where}: {len(people)} auxiliary people are too few, an attacker needs {least}")
        self.order = np.random.default_rng([config.seed, 0xA0]).permutation(people)
        self.people = sorted({min(n or len(people), len(people)) for n in config.people})
        if not config.curve_attackers:
            self.people = self.people[-1:]
        self.groups_N = groups_N
        total_3hw = torch.stack([to_float(part).sum(0) for part in aux.images_N3HW.split(1024)]).sum(0)
        mean_3hw = to_uint8(total_3hw / len(aux.images_N3HW))
        asked_Q = np.arange(len(self.query.pids_N))
        self.mean_picture_Q = self.pixels(mean_3hw.expand(len(asked_Q), -1, -1, -1), asked_Q)["ssim"]
        self.world = digest(self.tests, aux.images_N3HW, aux.pids_N, groups_N)

    def attacker(self, name: str, *, few: bool = False) -> Attacker:
        """A fresh one; ``few``: with fewer people than all."""
        return ATTACKERS[name](getattr(self.config.on_curve() if few else self.config, name))

    def recogniser(self, rows: np.ndarray) -> Recogniser | None:
        """The ReID model that was, or now is, trained on these auxiliary pictures; None where no attacker asks one."""
        return self.recognisers.of(*self._people(rows)) if self.recognisers else None

    def positions(
        self,
        features_ND: Tensor,
        leaked_LD: Tensor,
        asked: int,
        rows: np.ndarray | None = None,
        pictured: np.ndarray | None = None,
    ) -> Layout | None:
        """Where the numbers behind codes lie (``attacks.unfolded.positions``); None where features aren't bits. The
        features are those of the auxiliary ``rows``, told to be of the pictures ``pictured``: all, if nothing is
        said."""
        if not are_bits(features_ND):
            return None
        rows = np.arange(len(self.aux.pids_N)) if rows is None else rows
        pictured = rows if pictured is None else pictured
        key = digest(features_ND, leaked_LD, rows, pictured)
        if key not in self._positions:
            for older in list(self._positions)[: 1 - OPENED]:
                del self._positions[older]
            config = self.config
            own = None
            if config.unfolded.asks_pictures and (recogniser := self.recogniser(rows)) is not None:
                split = Split.of(self.groups_N[rows], config.seed)
                own = Own(recogniser, self.aux.images_N3HW[torch.from_numpy(pictured)], split)
            self._positions[key] = positions(features_ND, leaked_LD, config.unfolded, asked, config.seed, own)
        return self._positions[key]

    def _people(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Pictures, people and groups of these auxiliary rows."""
        return self.aux.images_N3HW[torch.from_numpy(rows)], self.aux.pids_N[rows], self.groups_N[rows]

    def pixels(self, drawn_Q3hw: Tensor, asked_Q: np.ndarray) -> dict[str, np.ndarray]:
        """Pixel scores of reconstructions (uint8) of the query rows ``asked_Q``, on the person if masks are known."""
        rows, masks = torch.from_numpy(asked_Q), self.query.masks_N1HW
        return scores(drawn_Q3hw, self.query.images_N3HW[rows], None if masks is None else masks[rows])

    def judged(self, drawn_Q3hw: Tensor, asked_Q: np.ndarray, *, seconds: float) -> Outcome:
        """The scores of reconstructions (uint8) of the query rows ``asked_Q``; all of them are ``shown``."""
        pixel, rows = self.pixels(drawn_Q3hw, asked_Q), torch.from_numpy(asked_Q)
        real_Q3hw = self.query.images_N3HW[rows]
        people = self.query.pids_N[asked_Q], self.query.camids_N[asked_Q]
        found = {axis: judge.rank(drawn_Q3hw, people, self.gallery).ap_Q for axis, judge in self.judges.items()}
        return Outcome(
            scores={"pixel": pixel["ssim"], **found, **self.perception.scores(drawn_Q3hw, real_Q3hw)},
            l1=float(np.nanmean(pixel["l1"])),
            psnr=float(np.nanmean(pixel["psnr"])),
            kid=self.perception.kid(drawn_Q3hw, self.real_QD[rows]),
            best=float("nan"),
            seconds=seconds,
            shown=drawn_Q3hw.cpu(),
        )

    def took(self) -> dict[str, float]:
        """Seconds of what attackers share, by what it is, kept from before or not."""
        found = Counter[str]()
        for n in self.people:
            names = self.config.attackers if n == self.people[-1] else self.config.curve_attackers
            if self.recognisers and any(self.attacker(name).asks_recogniser for name in names):
                people = self._people(np.flatnonzero(np.isin(self.aux.pids_N, self.order[:n])))
                found.update(self.recognisers.took(*people, asked_widths(self.config, names)))
        return dict(found)

    def _spent(self) -> float:
        return self.recognisers.spent if self.recognisers else 0.0

    def say(self, label: str, line: str) -> None:
        self.progress(f"{label}: {line}")

    def trainings(self, role: Role) -> list[Training]:
        """Of every attacker with every number of people."""
        return [training for _, _, draws in self._trainings(role) for training in draws]

    def train_all(self, role: Role) -> Trained:
        """Every attacker with every number of people."""
        trained: Trained = {}
        for name, n, draws in self._trainings(role):
            outcomes = [self.work.outcome(training) for training in draws]
            # Never by the test: an adversary has his own people to choose by, and no others.
            best = min(outcomes, key=lambda outcome: outcome.held_out) if len(outcomes) > 1 else outcomes[0]
            trained[name, n] = replace(best, seconds=sum(outcome.seconds for outcome in outcomes))
        return trained

    def missing(self, roles: Sequence[Role]) -> Counter[tuple[str, bool]]:
        """How many trainings of each attacker, and whether by ``config.on_curve()``, aren't kept from before."""
        return Counter(
            (name, n < self.people[-1] and self.config.curve_steps is not None)
            for role in roles
            for name, n, draws in self._trainings(role)
            for training in draws
            if not self.work.is_kept(training)
        )

    def _trainings(self, role: Role) -> Iterator[tuple[str, int, list[Training]]]:
        """By attacker and number of people, one for every draw. The adaptive one starts from the role's ``reversal``,
        and is left out without it."""
        reversal = role.reversal
        for n in self.people:
            few = n < self.people[-1]
            rows = np.flatnonzero(np.isin(self.aux.pids_N, self.order[:n]))
            pairs = permute_people(self.groups_N[rows], self.config.seed) if role.permuted else np.arange(len(rows))
            whole = len(rows) == len(self.aux.pids_N)
            features_ND = role.aux_ND if whole else role.aux_ND[rows]  # once for all attackers: they may be large
            parts = (features_ND, rows, rows[pairs], role.query_QD, role.leaked_LD)
            made_of = digest(self.world, *parts)
            for name in self.config.curve_attackers if few else self.config.attackers:
                if name == Adaptive.name and reversal is None:
                    continue
                start = reversal.state_dict().values() if reversal and name == Adaptive.name else []
                trainings = []
                for draw in range(self.config.seeds if issubclass(ATTACKERS[name], Learner) else 1):
                    label = f"{name}, {n} people, {role.name}" + (f", seed {draw + 1}" if draw else "")
                    settings = [name, to_dict(self.attacker(name, few=few).config), self.config.seed, draw]
                    make = partial(self._train, label, self.attacker(name, few=few), draw, *parts, reversal)
                    needs: list[str] = []
                    asks = self.attacker(name).asks_recogniser
                    if self.attacker(name).asks_positions and are_bits(features_ND):
                        settings.append(to_dict(self.config.unfolded))
                        asks = True
                    if self.recognisers and asks:
                        settings += self.recognisers.settings
                        needs = self.recognisers.keys(*self._people(rows), asked_widths(self.config, [name]))
                    key = digest(made_of, settings, *start)
                    trainings.append(Training(label=label, key=key, make=make, needs=needs))
                yield name, n, trainings

    def _train(
        self,
        label: str,
        attacker: Attacker,
        draw: int,
        features_ND: Tensor,
        rows: np.ndarray,
        pictured: np.ndarray,
        query_QD: Tensor,
        leaked_LD: Tensor,
        reversal: Generator | None,
    ) -> Outcome:
        attacker.leaked_LD, attacker.asked = leaked_LD, len(query_QD)
        attacker.people_N = self.aux.pids_N[rows]
        if attacker.asks_positions:
            attacker.positions = self.positions(features_ND, leaked_LD, len(query_QD), rows, pictured)
        if attacker.asks_recogniser:
            attacker.recogniser = self.recogniser(rows)
        started, spent = time.monotonic(), self._spent()
        if isinstance(attacker, Adaptive) and reversal is not None:
            attacker.start_from(reversal)
        if isinstance(attacker, Learner):
            attacker.redraw(draw)
        attacker.fit(
            features_ND,
            self.aux.images_N3HW[pictured],
            self.groups_N[rows],
            seed=self.config.seed,
            progress=partial(self.say, label),
        )
        drawn, best = [], []
        for rows_B in np.split(np.arange(len(query_QD)), range(256, len(query_QD), 256)):
            guesses_SB3hw = attacker.guesses(query_QD[torch.from_numpy(rows_B)])
            drawn.append(to_uint8(guesses_SB3hw.mean(0)))
            if len(guesses_SB3hw) > 1:
                each = [self.pixels(to_uint8(guess_B3hw), rows_B)["ssim"] for guess_B3hw in guesses_SB3hw]
                best.append(np.max(each, 0))
        drawn_Q3hw = torch.cat(drawn)
        seconds = time.monotonic() - started - (self._spent() - spent)  # others share what was learnt first
        outcome = self.judged(drawn_Q3hw, np.arange(len(drawn_Q3hw)), seconds=seconds)
        bound = float(np.nanmean(np.concatenate(best))) if best else float("nan")
        return replace(
            outcome,
            best=bound,
            shown=outcome.shown[self.shown],
            held_out=attacker.held_out,
            still_falling=attacker.still_falling,
        )
