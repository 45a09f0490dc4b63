"""Trainings shared out: each is made once, by one of the processes that share a folder, and known to all of them."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from ppreid_dist.attacks.base import Outcome, Progress
from ppreid_dist.attacks.kept import Kept

PAUSE = 1.0  # seconds between looks at what other processes make


@dataclass(frozen=True, kw_only=True)
class Training:
    """One that may be kept under ``key`` from before, as may what it ``needs``."""

    label: str
    key: str
    make: Callable[[], Outcome]
    needs: Sequence[str] = ()


class Work:
    """What is made is put into ``kept``, where there is one, and taken from there instead of being made again.

    ``progress`` hears what is waited for, ``found`` what each training that is over has found on these ``axes``.
    """

    def __init__(self, kept: Kept | None, *, axes: Iterable[str], progress: Progress, found: Progress):
        self.kept, self.axes, self.progress, self.found = kept, list(axes), progress, found
        self._outcomes: dict[str, Outcome] = {}  # by key

    def outcome(self, training: Training) -> Outcome:
        """What was kept of it, or what it now gives, which is then kept."""
        self.carry_out([training])
        return self._outcomes[training.key]

    def carry_out(self, trainings: Iterable[Training]) -> None:
        """Return when these are made, each by one of the processes that share ``kept``."""
        left = {training.key: training for training in trainings if training.key not in self._outcomes}
        before = {key for key, training in left.items() if self.is_kept(training)}
        while left:
            done = [key for key, training in left.items() if self._settled(training, key in before)]
            for key in done:
                del left[key]
            if left and not done:
                self.progress(f"waiting for trainings that other processes make: {len(left)}")
                time.sleep(PAUSE)

    def is_kept(self, training: Training) -> bool:
        """Whether it was made before; damaged or not."""
        return self.kept is not None and self.kept.has(training.key)

    def _settled(self, training: Training, before: bool) -> bool:
        """Whether its outcome is known now; not while another process makes it, or what it needs."""
        with self.kept.alone(training.key) if self.kept else nullcontext(True) as mine:
            if not mine:
                return False
            outcome = self.kept.get(training.key) if self.kept else None
            kept_before = before and outcome is not None
            if outcome is None:
                if self.kept and self.kept.made_elsewhere(training.needs):
                    return False
                outcome = training.make()
                if self.kept:
                    self.kept.put(training.key, outcome)
        self._outcomes[training.key] = outcome
        how = "kept from before" if kept_before else f"{outcome.seconds:.1f} s"
        reached = ", ".join(f"{axis} {np.nanmean(outcome.scores[axis]):.3f}" for axis in self.axes)
        self.found(f"{training.label}: {reached}, {how}")
        return True
