"""What attackers learn before they attack: a ReID model of their own people, and a decoder of what it sees.

Each is trained once for the pictures that it is asked for, shared by all attackers and victims, and kept.

Shapes: N pictures, h w pixels.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

from ppreid_dist.attacks.base import ATTACKERS, Progress, picture_size
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.inverse import blank, train_inverse
from ppreid_dist.attacks.kept import Kept, digest, source_digest
from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.recogniser import Recogniser, shape_of, train_recogniser, untrained
from ppreid_dist.models.extractor import Extractor
from ppreid_dist.models.generator import Generator
from ppreid_dist.settings import to_dict

M = TypeVar("M", bound=nn.Module)


def asked_widths(config: AttackConfig, attackers: Sequence[str]) -> set[int]:
    """The widths of these attackers' networks that begin as such a decoder."""
    own = [getattr(config, name) for name in attackers if ATTACKERS[name](getattr(config, name)).asks_recogniser]
    return {width for of in own for width in getattr(getattr(of, "start", of), "widths", [])}


class Recognisers:
    """``spent`` counts the seconds that this process trained, or waited for another one's training."""

    def __init__(self, config: AttackConfig, kept: Kept | None, *, say: Callable[[str, str], None], found: Progress):
        """``say`` hears, by a label, how a training goes, ``found`` how long it took. ConfigError naming
        ``attack.recogniser.backbone`` where there is none."""
        self.config, self.kept, self.say, self.found = config, kept, say, found
        network = untrained(config.recogniser, 1, config.seed)
        weights = (part for item in network.state_dict().items() for part in item)
        self.backbone = digest(shape_of(network), *weights)
        self.spent = 0.0
        self._took: dict[tuple[str, str], float] = {}  # seconds by what it is and its key
        self._made: dict[str, Recogniser] = {}

    @property
    def settings(self) -> list[object]:
        """All that figures hang on, for a digest."""
        return [to_dict(self.config.recogniser), self.backbone, to_dict(self.config.inverse)]

    def of(self, images_N3hw: Tensor, pids_N: np.ndarray, groups_N: np.ndarray) -> Recogniser:
        """The one of these pictures, (N, 3, h, w) in uint8. Its decoder holds out people by ``groups_N``, as attackers
        do."""
        config, people = self.config, len(np.unique(pids_N))
        split = Split.of(groups_N, config.seed)
        key, both = self._keys(images_N3hw, pids_N, split)
        if both in self._made:
            return self._made[both]

        def train(progress: Progress) -> Extractor:
            return train_recogniser(images_N3hw, pids_N, config.recogniser, seed=config.seed, progress=progress).network

        empty = untrained(config.recogniser, people, config.seed)
        network = self._once("recogniser", f"recogniser, {people} people", key, empty, train)
        made = Recogniser(network.to(images_N3hw.device))
        made.inverse = cache(partial(self._inverse, both, made, images_N3hw, people, split))
        self._made[both] = made
        return made

    def took(
        self, images_N3hw: Tensor, pids_N: np.ndarray, groups_N: np.ndarray, widths: Iterable[int]
    ) -> dict[str, float]:
        """Seconds, by what was trained, of these pictures' and its decoders', kept from before or not; nothing of what
        isn't there."""
        key, *inverses = self.keys(images_N3hw, pids_N, groups_N, widths)
        found: dict[str, float] = {}
        for what, its_key in [("recogniser", key), *(("inverse", its_key) for its_key in inverses)]:
            if (what, its_key) not in self._took and self.kept and (before := self.kept.weights(its_key)) is not None:
                self._took[what, its_key] = before[1]
            found[what] = found.get(what, 0.0) + self._took.get((what, its_key), 0.0)
        return found

    def keys(self, images_N3hw: Tensor, pids_N: np.ndarray, groups_N: np.ndarray, widths: Iterable[int]) -> list[str]:
        """Under which these pictures' and its decoders' are kept."""
        key, both = self._keys(images_N3hw, pids_N, Split.of(groups_N, self.config.seed))
        return [key, *(digest(both, width) for width in widths)]

    def _keys(self, images_N3hw: Tensor, pids_N: np.ndarray, split: Split) -> tuple[str, str]:
        """Of the model, and of its decoders but for their width."""
        own = [to_dict(self.config.recogniser), self.backbone, self.config.seed]
        key = digest(source_digest(), "recogniser", own, images_N3hw, pids_N)
        return key, digest(key, "inverse", to_dict(self.config.inverse), split.fit_F)

    def _inverse(
        self, key: str, recogniser: Recogniser, images_N3hw: Tensor, people: int, split: Split, width: int
    ) -> Generator:
        config, size = self.config, picture_size(images_N3hw)

        def train(progress: Progress) -> Generator:
            return train_inverse(
                recogniser, images_N3hw, split, width, config.inverse, seed=config.seed, progress=progress
            )

        label = f"inverse of the recogniser, {people} people, width {width}"
        made = self._once("inverse", label, digest(key, width), blank(recogniser, size, width), train)
        return made.to(images_N3hw.device)

    def _once(self, what: str, label: str, key: str, empty: M, train: Callable[[Progress], M]) -> M:
        """The weights that were kept under ``key``, in ``empty``, or what is now trained, which is then kept."""
        waited = time.monotonic()
        with self.kept.alone(key, wait=True) if self.kept else nullcontext():
            if self.kept and (before := self.kept.weights(key)) is not None:
                weights, seconds = before
                try:
                    empty.load_state_dict(weights)
                    self._took[what, key] = seconds
                    self.spent += time.monotonic() - waited
                    return empty
                except RuntimeError:
                    pass  # of another torch or transformers: it is trained again
            started = time.monotonic()
            made = train(partial(self.say, label))
            self._took[what, key] = seconds = time.monotonic() - started
            if self.kept:
                self.kept.put_weights(key, {name: of.cpu() for name, of in made.state_dict().items()}, seconds)
        self.spent += time.monotonic() - waited
        self.found(f"{label}: {seconds:.1f} s")
        return made
