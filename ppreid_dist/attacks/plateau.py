"""Networks trained until held-out people gain no more: what every attacker that learns by gradient descent shares.

Shapes: N its own pictures, F those fitted, B batch, D feature dim, K view dim.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ppreid_dist.attacks.base import VIEWS, Attacker, Progress, View, fit_view, split_people
from ppreid_dist.errors import ConfigError
from ppreid_dist.models.ema import Ema
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings, option
from ppreid_dist.transfer import to_device

T = TypeVar("T", bound="Trainee")
S = TypeVar("S", bound=Settings)
LOOKED_AT = 400  # pictures of held-out people at most: of more, looks would take longer than the steps between them


@dataclass(kw_only=True)
class PlateauConfig(Settings):
    """When a training is over: an upper bound, and patience."""

    max_steps: int = option(20_000, "most steps; 0 leaves it as it begins", at_least=0)
    evaluate_every: int = option(200, "steps between looks at the held-out people", at_least=1)
    patience: int = option(4, "looks without a better one before the learning rate falls", at_least=1)
    falls: int = option(2, "how often the learning rate falls, to a quarter, before the training ends", at_least=0)


@dataclass(kw_only=True)
class DescentConfig(Settings):
    """What a step is."""

    batch: int = option(64, "pictures a step", at_least=2)
    weight_decay: float = option(0.01, "decoupled weight decay", at_least=0)
    feature_noise: float = option(0.3, "noise added to the features, relative to their norm", at_least=0)
    ema: float = option(0.99, "decay of the averaged weights, which are the ones that count", at_least=0, less_than=1)


@dataclass(kw_only=True)
class StepsConfig(DescentConfig):
    """The same with how a training goes, and the learning rates that are tried."""

    lrs: list[float] = option([1e-3, 3e-3], "learning rates to try", more_than=0)
    trial_steps: int = option(600, "steps of each combination before the best goes on alone", at_least=0)
    plateau: PlateauConfig = option(PlateauConfig(), "")


@dataclass(kw_only=True)
class RecipeConfig(StepsConfig):
    """The same with the features and networks that are tried."""

    # In trials whitening was better with 160 people, and threw most of the leak away with 40: it has to be tried.
    views: list[str] = option(list(VIEWS), "forms of the features to try", choices=VIEWS)
    widths: list[int] = option([32, 64], "network widths to try", at_least=1)


def cut(config: S, steps: int) -> S:
    """The same with every trial of a race and every training to a plateau ended after ``steps`` at the latest."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    changed: dict[str, Any] = {key: cut(value, steps) for key, value in values.items() if isinstance(value, Settings)}
    for bound in ("max_steps", "trial_steps"):
        if bound in values:
            changed[bound] = min(values[bound], steps)
    return replace(config, **changed)


@dataclass(frozen=True)
class Split:
    """Rows to fit on and rows to choose on, the ``seed`` that drew them, and who is on each row: all trainings of one
    attacker share it."""

    fit_F: np.ndarray
    held_H: np.ndarray
    seed: int
    pids_N: np.ndarray

    @classmethod
    def of(cls, pids_N: np.ndarray, seed: int) -> "Split":
        """By ``base.split_people``."""
        return cls(*split_people(pids_N, seed), seed, pids_N)


class Trainee(ABC):
    """A network in training on one view of the features, by one learning rate; its averaged weights count."""

    def __init__(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        split: Split,
        *,
        view: str,
        lr: float,
        build: Callable[[int], nn.Module],
        config: DescentConfig,
        seed: int,
    ):
        """``build`` makes the network, on the CPU, for features of so many dimensions."""
        looked_at = np.random.default_rng([split.seed, 0x100C]).permutation(split.held_H)[:LOOKED_AT]
        fit, held = torch.from_numpy(split.fit_F), torch.from_numpy(np.sort(looked_at))
        self.config = config
        self.view: View = fit_view(view, features_ND[fit])
        self.x_FK, self.pictures_F3hw = self.view(features_ND[fit]), pictures_N3hw[fit]
        self.held, self.held_pictures = features_ND[held], pictures_N3hw[held]
        network = build(self.view.dim)
        self.network = network.to(features_ND.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = Ema(self.network, config.ema)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.random = torch.Generator().manual_seed(seed)
        self.noise = self.random
        if features_ND.is_cuda:  # a CPU would draw and copy for longer than a step takes
            self.noise = torch.Generator(features_ND.device).manual_seed(seed)
        self.weights = copy.deepcopy(self.network.state_dict())
        self.begin_looks()

    @property
    @abstractmethod
    def name(self) -> str:
        """What was chosen, in words."""

    @abstractmethod
    def step(self, x_BK: Tensor, real_B3hw: Tensor) -> None:
        """One step on features and their pictures, in [0,1], which are ``rows_B`` of those fitted; ends in
        :meth:`descend`."""

    @abstractmethod
    def error(self) -> float:
        """Of the averaged weights, on the held-out people."""

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step(*self._draw())
        self.steps += steps

    def _draw(self) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.x_FK), (self.config.batch,), generator=self.random)
        self.rows_B = rows = to_device(rows, self.x_FK.device)
        x_BK = self.x_FK[rows]
        noise_BK = self.normal(x_BK.shape) / x_BK.shape[1] ** 0.5
        return x_BK + self.config.feature_noise * noise_BK, to_float(self.pictures_F3hw[rows])

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, on the features' device, from this training's own stream."""
        drawn = torch.randn(tuple(shape), generator=self.noise, device=self.noise.device)
        return to_device(drawn, self.x_FK.device).to(self.x_FK.dtype)

    def descend(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.average.update(self.network.state_dict())

    def set_lr(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr

    def go_on_from(self, weights: dict[str, Tensor]) -> None:
        """Put these weights in place of the present ones and of their average."""
        self.network.load_state_dict(weights)
        self.average.module.load_state_dict(weights)
        if any(not moment.isfinite().all() for of in self.optimiser.state.values() for moment in of.values()):
            self.optimiser.state.clear()  # or every step from here would spoil them again

    def begin_looks(self) -> None:
        """Forget how good the weights ever were: they are to be judged anew."""
        self.best, self.steps = float("inf"), 0
        self.looks: list[tuple[int, float]] = []  # steps done, and the best error until then

    @property
    def still_falling(self) -> float:
        """The share by which the best error fell over the last quarter of the steps; 1 where nobody looked before."""
        before = [best for steps, best in self.looks if steps <= 0.75 * self.steps]
        return 1 - self.best / before[-1] if before else 1.0

    def look(self) -> bool:
        """Test on the held-out people, and keep the weights if they are the best so far."""
        error = self.error()
        if better := error < self.best:
            self.best, self.weights = error, copy.deepcopy(self.average.module.state_dict())
        self.looks.append((self.steps, self.best))
        return better

    def train_to_plateau(self, plateau: PlateauConfig, max_steps: int, say: Callable[[str], None]) -> None:
        """Train until looks find nothing better; end with the best weights, those from before included."""
        lr, falls, since, steps = self.optimiser.param_groups[0]["lr"], 0, 0, 0
        while steps < max_steps and falls <= plateau.falls:
            some = min(plateau.evaluate_every, max_steps - steps)
            self.train(some)
            steps += some
            since = 0 if self.look() else since + 1
            if since == plateau.patience:
                falls, since = falls + 1, 0
                self.go_on_from(self.weights)
                self.set_lr(lr / 4**falls)
        self.go_on_from(self.weights)
        self.set_lr(lr)
        say(f"{self.name}: {steps} steps, held-out error {self.best:.4f}")


def race(entrants: Sequence[Callable[[], T]], config: StepsConfig, say: Callable[[str], None]) -> T:
    """A short trial of every entrant; the best on its held-out people goes on to its plateau."""
    leading: list[T] = []
    for enter in entrants:
        trainee = enter()
        if len(entrants) > 1:
            trainee.train_to_plateau(config.plateau, config.trial_steps, say)
        leading = [min([trainee, *leading], key=lambda t: t.best)]  # the others' memory is given back
    leading[0].train_to_plateau(config.plateau, config.plateau.max_steps, say)
    return leading[0]


class Learner(Attacker):
    """An attacker in whose training chance has a part: its weights and batches are drawn."""

    draw = 0

    def redraw(self, draw: int) -> None:
        """Be trained by other draws, before :meth:`fit`; 0 are the first. The people held out stay the same, so that
        the ``held_out`` of several trainings can be compared."""
        self.draw = draw

    def fit(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        pids_N: np.ndarray,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        if self.asks_recogniser and self.recogniser is None:
            raise ConfigError(f"{self.name}: its likeness is more than 0, and it was given no recogniser")
        split = Split.of(pids_N, seed)
        if self.people_N is not None:
            split = replace(split, pids_N=self.people_N)
        drawn = int(np.random.default_rng([seed, 0xD4A, self.draw]).integers(2**31)) if self.draw else seed
        say = progress or (lambda line: None)
        ended = self.learn(features_ND, pictures_N3hw, split, seed=drawn, say=say)
        self.held_out, self.still_falling = ended.best, ended.still_falling

    @abstractmethod
    def learn(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, *, seed: int, say: Callable[[str], None]
    ) -> Trainee:
        """One whole training; returns what it ended with."""
