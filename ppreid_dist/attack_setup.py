"""Finished runs as their attackers meet them: checked, opened, and what both store of the same people.

Shapes: N auxiliary pictures, Q query entries, G gallery entries, S stored dim, D feature dim, A coded numbers, h w
pixels. With `data.tracklet` above 1 an entry holds several pictures; each of the attackers' heads one of its own.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.adaptive import TURNED, for_stored, trained_generator
from ppreid_dist.attacks.auxiliary import Auxiliary, same_people
from ppreid_dist.attacks.bench import Bench, Opened, Victim
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.enrolled import DIRECTIONS, read
from ppreid_dist.attacks.judging import Judge
from ppreid_dist.attacks.kept import Kept, digest, source_digest
from ppreid_dist.attacks.linkage import Stored
from ppreid_dist.attacks.perceptual import Perception
from ppreid_dist.attacks.victims import leaked_by
from ppreid_dist.data.dataset import load_split, open_split, open_training
from ppreid_dist.data.index import read_meta
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError, RunError
from ppreid_dist.evaluation.export import rank_split, rerank_split
from ppreid_dist.evaluation.ranking import Ranking
from ppreid_dist.evaluation.tracklets import Enrolment
from ppreid_dist.experiment import Config, compared, load_run
from ppreid_dist.judges import check_judges, check_judges_pictures, check_unseen, open_judges
from ppreid_dist.models.extractor import Extractor
from ppreid_dist.models.folder import SavedExtractor, load_extractor
from ppreid_dist.models.generator import Generator
from ppreid_dist.models.stores.base import Store, StoreConfig
from ppreid_dist.models.stores.coded import Coded
from ppreid_dist.pixels import resize, to_float
from ppreid_dist.progress import say
from ppreid_dist.settings import load_settings, to_dict
from ppreid_dist.transfer import default_device

# Control and protected must be the same training but for these.
METHOD = ("privacy.", "neighbourhood.", "reversal.", "data.strangers_split", "training.warm", "model.store.")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """``victims`` and ``rankings`` of "control" and "protected"; ``rankings`` say how well they match people.

    ``bench`` is called with ``progress``, which hears how a training goes, and ``found``, which hears what each one
    that is over has found.
    """

    bench: Callable[..., Bench]
    query: Pictures
    victims: dict[str, Victim]
    auxiliaries: list[Auxiliary]
    judges: list[Judge]
    rankings: dict[str, Ranking]


def set_up(
    config: Config,
    control: Path,
    protected: Path,
    judges: Sequence[Path],
    kept: Path,
    *,
    progress: bool = False,
) -> Setup:
    """Open the runs and the pictures. ``kept`` is the folder of attackers' trainings.

    Raises RunError where the runs can't be compared: control and protected must be the same training but for the
    protection, each judge another model than all others, the auxiliary people unknown to control and protected.
    """
    device, other = default_device(), _other_domain(config)
    _check_comparable(control, protected, judges)
    enrolment = _enrolment(config, control)
    _check_leaked(config)
    extractors = {"control": load_extractor(control / "model", device)}
    extractors["protected"] = load_extractor(protected / "model", device)
    _check_pictures(config, control, protected, extractors)
    check_judges_pictures(judges, config.data)
    perception = Perception(config.attack.perceptual, device)
    size = config.reversal.size

    @cache  # whoever sees them at one size shares them: they can be large
    def pictures_of(split: str, size: tuple[int, int]) -> Pictures:
        return load_split(config.data, split, size, device, progress=progress)

    judging = open_judges(judges, config.attack.onnx, partial(pictures_of, "gallery"), device)
    aux, query, gallery = (pictures_of(split, size) for split in ("aux", "query", "gallery"))
    query = enrolment.heads(query)
    splits = ("aux", "query", "gallery", *config.attack.leaked)
    seen = {role: {split: pictures_of(split, saved.size) for split in splits} for role, saved in extractors.items()}
    victims, rankings, galleries_GD = {}, {}, {}
    for role, saved in extractors.items():
        victims[role], rankings[role], galleries_GD[role] = _victim(role, saved, seen[role], config.attack, enrolment)
        if config.attack.whitebox.people:
            victims[role] = replace(victims[role], opened=_opened(saved, victims[role], seen[role]["aux"]))
    extractor, known = extractors["protected"].extractor, seen["protected"]
    victims["protected"] = replace(
        victims["protected"],
        reversal=_reversal(protected, extractor, enrolment, known["aux"], victims["protected"].aux_ND, size),
        rekeyed=_rekeyed(extractor, enrolment, known, config.attack.leaked),
    )
    auxiliaries = []
    if other is not None:
        auxiliaries.append(_strangers(*other, size, extractors, enrolment, device, progress))
    if "same_people" in config.attack.auxiliary.variants:
        auxiliaries.append(same_people(enrolment.heads(gallery), query, galleries_GD))
    if "extractor" in config.attack.auxiliary.variants:
        plain_ND = _plain(extractor, enrolment, known["aux"])
        auxiliaries += _with_extractor(config.attack, extractor, plain_ND, aux, victims, Kept(kept), progress)
    bench = partial(
        Bench,
        aux=aux,
        query=query,
        gallery_pids=gallery.pids_N,
        gallery_camids=gallery.camids_N,
        judges=judging,
        config=config.attack,
        perception=perception,
        kept=Kept(kept),
    )
    return Setup(bench=bench, query=query, victims=victims, auxiliaries=auxiliaries, judges=judging, rankings=rankings)


@contextmanager
def _storing(extractor: Extractor, store: Store) -> Iterator[Extractor]:
    """The extractor with another store for as long as it takes."""
    before, extractor.store = extractor.store, store
    try:
        yield extractor
    finally:
        extractor.store = before


def _reversal(
    run: Path, extractor: Extractor, enrolment: Enrolment, aux: Pictures, stored_NS: Tensor, size: tuple[int, int]
) -> Generator | None:
    """The generator that the run was trained against, if it draws pictures of this size, for what the run stores."""
    config = load_run(run)
    if tuple(config.reversal.size) != tuple(size):
        return None
    if (generator := trained_generator(run, config.reversal)) is None:
        return None
    generator = generator.to(stored_NS.device)
    if config.model.store.kind not in TURNED:
        return generator
    return for_stored(generator, stored_NS, _plain(extractor, enrolment, aux), aux.pids_N, seed=config.seed)


def _plain(extractor: Extractor, enrolment: Enrolment, aux: Pictures) -> Tensor:
    """(N, D): the attackers' features as they are before anything else is made of them."""
    with _storing(extractor, Store(StoreConfig(), extractor.feature_dim)):
        return enrolment.stored(extractor, aux, each=True)


def _with_extractor(
    config: AttackConfig,
    extractor: Extractor,
    plain_ND: Tensor,
    aux: Pictures,
    victims: Mapping[str, Victim],
    kept: Kept,
    progress: bool,
) -> list[Auxiliary]:
    """What the database reads like by the extractor and few people enrolled, for each of their numbers; nothing where
    no key hides it. ``plain_ND`` is what the extractor makes of ``aux``, before it is stored."""
    store, stolen_LS, people = extractor.store.config, leaked_by(victims["protected"]), np.unique(aux.pids_N)
    if not extractor.store.keyed or store.kind not in TURNED:  # noise leaves the numbers what they are
        return []
    if (most := max(config.auxiliary.enrolled)) > len(people):
        raise ConfigError(f"attack.auxiliary.enrolled: {most}, but there are {len(people)} auxiliary people")
    order, found = np.random.default_rng([config.seed, 0xE1]).permutation(people), []
    stored_NS = victims["protected"].aux_ND
    for count in config.auxiliary.enrolled:
        rows_E = np.flatnonzero(np.isin(aux.pids_N, order[:count]))
        parts, directions = (stolen_LS, stored_NS[torch.from_numpy(rows_E)], plain_ND, rows_E), store.axes or DIRECTIONS
        key = digest(source_digest(), "enrolled", *parts, directions, config.seed, to_dict(config.unfolded))
        # Once, whatever the processes: on a GPU it isn't the same to the bit.
        with kept.alone(key, wait=True):
            if (before := kept.weights(key)) is None:
                started = time.monotonic()
                if progress:
                    say(f"attack: the database is read by the extractor and {count} people enrolled under its key")
                own_NK, read_LK = read(*parts, directions=directions, config=config.unfolded, seed=config.seed)
                before = {"own": own_NK.cpu(), "stolen": read_LK.cpu()}, time.monotonic() - started
                kept.put_weights(key, *before)
        of = {name: part.to(stolen_LS.device) for name, part in before[0].items()}
        found.append(
            Auxiliary(
                variant=f"extractor, {count} enrolled",
                pictures=aux,
                features_ND={"control": victims["control"].aux_ND, "protected": of["own"]},
                stolen_LD={"protected": of["stolen"]},
            )
        )
    return found


def _rekeyed(
    extractor: Extractor, enrolment: Enrolment, pictures: Mapping[str, Pictures], leaked: Sequence[str]
) -> Stored | None:
    """The same people as the same extractor would store them under another key; None where there is no key."""
    if not extractor.store.keyed:
        return None
    with _storing(extractor, extractor.store.rekeyed()):
        kept = {
            split: enrolment.stored(extractor, pictures[split], each=split == "aux")
            for split in ("aux", "query", *leaked)
        }
    return Stored(kept["aux"], kept["query"], torch.cat([kept[split] for split in ("query", *leaked)]))


def _other_domain(config: Config) -> tuple[Config, str] | None:
    """The configuration of the other data set that attackers learn on, if they do, and the split: its aux people, or
    those of its train split."""
    asked = config.attack.auxiliary
    if "other_domain" not in asked.variants:
        return None
    other = load_settings(Config, asked.data)
    if Path(other.data.shards).resolve() == Path(config.data.shards).resolve():
        raise ConfigError(f"attack.auxiliary.data: {asked.data} names the same shards as the runs' own data")
    open_split(other.data, "train")  # where there are no shards it says how to write them
    return other, "aux" if "aux" in read_meta(Path(other.data.shards))["splits"] else "train"


def _strangers(
    other: Config,
    split: str,
    size: tuple[int, int],
    extractors: dict[str, SavedExtractor],
    enrolment: Enrolment,
    device: torch.device,
    progress: bool,
) -> Auxiliary:
    """The other data set's people, as the attackers and as both extractors see them."""
    features = {
        role: enrolment.stored(
            saved.extractor, load_split(other.data, split, saved.size, device, progress=progress), each=True
        )
        for role, saved in extractors.items()
    }
    pictures = load_split(other.data, split, size, device, progress=progress)
    return Auxiliary(variant="other_domain", pictures=pictures, features_ND=features)


def _victim(
    role: str, saved: SavedExtractor, pictures: dict[str, Pictures], config: AttackConfig, enrolment: Enrolment
) -> tuple[Victim, Ranking, Tensor]:
    """The victim, how well it ranks, and its features of the gallery."""
    features = {split: enrolment.stored(saved.extractor, of, each=split == "aux") for split, of in pictures.items()}
    for split, of_split in features.items():
        if not torch.isfinite(of_split).all():
            raise RunError(f"{role}: what it stores of {split} holds numbers that aren't finite")
    heads = enrolment.heads(pictures["query"]), enrolment.heads(pictures["gallery"])
    matched = features["query"], features["gallery"], *heads
    ranking = by_cosine = rank_split(*matched)
    if config.rerank:
        ranking = rerank_split(*matched)

    def see(images_B3hw: Tensor) -> Tensor:
        store: Store = saved.extractor.store
        return store.expected(saved.extractor(resize(images_B3hw, saved.size)).embedding_BD)

    victim = Victim(
        name=role,
        aux_ND=features["aux"],
        query_QD=features["query"],
        utility_ap_Q=ranking.ap_Q,
        cosine_ap_Q=by_cosine.ap_Q,
        see=see,
        leaked_LD=torch.cat([features[split] for split in config.leaked]) if config.leaked else None,
    )
    return victim, ranking, features["gallery"]


def _opened(saved: SavedExtractor, victim: Victim, aux: Pictures) -> Opened | None:
    """Codes and cells, opened by their key, sought from what is known of other people. Of the other kinds there is
    nothing to open."""
    store = saved.extractor.store
    if not isinstance(store, Coded):
        return None

    def see(images_B3hw: Tensor) -> Tensor:
        return store.coded(saved.extractor(resize(images_B3hw, saved.size)).embedding_BD)

    with torch.no_grad():
        known_NA = torch.cat([see(to_float(images_B3HW)) for images_B3HW in aux.images_N3HW.split(256)])
    people = np.unique(aux.pids_N)
    first_N = torch.from_numpy(np.isin(aux.pids_N, people[: len(people) // 2])).to(known_NA.device)
    aux_NA = torch.empty_like(known_NA)
    for half_N in (first_N, ~first_N):
        aux_NA[half_N] = store.opened(victim.aux_ND[half_N], known_NA[~half_N])
    return Opened(aux_ND=aux_NA, query_QD=store.opened(victim.query_QD, known_NA), see=see)


def _check_comparable(control: Path, protected: Path, judges: Sequence[Path]) -> None:
    count = Counter(path.resolve() for path in (control, protected, *judges))
    if twice := [path for path in (*judges, protected) if count[path.resolve()] > 1]:
        raise RunError(f"{twice[0]}: named twice: control, protected and the judges must all be different")
    configs = {run: load_run(run) for run in (control, protected)}
    settings = {run: compared(config, but=METHOD) for run, config in configs.items()}
    for key, value in settings[control].items():
        other = settings[protected][key]
        if value != other:
            raise RunError(f"{control}: not the control of {protected}: {key} is {value!r} there and {other!r} here")
    if weight := configs[control].privacy.weight:
        raise RunError(f"{control}: not a control: its privacy.weight is {weight}")
    if (how := configs[control].model.store.in_words) != "plain":
        raise RunError(f"{control}: not a control: its features are stored as {how}")
    for run in (control, protected):
        if "aux" in configs[run].data.train_splits:
            raise RunError(f"{run}: trained on the attackers' people (data.train_splits names aux)")
        check_unseen(run)
    check_judges(judges, protected)


def _enrolment(config: Config, control: Path) -> Enrolment:
    if (most := load_run(control).data.tracklet) != config.data.tracklet:
        raise ConfigError(f"data.tracklet: {config.data.tracklet}, but entries of {control} hold up to {most} pictures")
    return Enrolment(most)


def _check_leaked(config: Config) -> None:
    splits = read_meta(Path(config.data.shards))["splits"]
    if absent := [split for split in config.attack.leaked if split not in splits]:
        raise ConfigError(f"attack.leaked: {config.data.shards} has no split {absent[0]}, only {', '.join(splits)}")


def _check_pictures(config: Config, control: Path, protected: Path, extractors: Mapping[str, SavedExtractor]) -> None:
    """Where the pictures lie may differ from run to run, so their settings say little of who is on them."""
    trained = {role: saved.about.get("training pictures") for role, saved in extractors.items()}
    for role, run in (("control", control), ("protected", protected)):
        splits = load_run(run).data.train_splits
        if not set(splits) <= set(read_meta(Path(config.data.shards))["splits"]):
            continue  # of a data set that nobody trained on
        if trained[role] != open_training(replace(config.data, train_splits=splits)).fingerprint:
            raise RunError(
                f"{run}: trained on other pictures than {', '.join(splits)} of {config.data.shards} (data.shards), so "
                "that the attackers' people may be among them"
            )
    if trained["control"] != trained["protected"]:
        raise RunError(f"{control}: not the control of {protected}: they were trained on different pictures")
