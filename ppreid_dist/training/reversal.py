"""The reversal module: a generator that learns to draw the person behind a stored feature, with or without a critic.

``gan`` is our reading of the paper's adversary (only its abstract is known to us): reconstruction and a conditional
critic, alternating with the extractor in two steps, the extractor playing a lazily updated copy: against what it draws
alone, or against the critic's judgement of it, too (``gradient``). ``regression`` is the same without critic and noise.
Every random draw derives from (seed, turn), so a resumed game repeats it.

Shapes: B this rank's rows, D feature, h×w the reversal's picture, z noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppreid_dist import distributed
from ppreid_dist.errors import ConfigError
from ppreid_dist.losses.adversarial import (
    AdversarialConfig,
    critic_loss,
    found_out,
    generator_loss,
    r1_due,
    r1_penalty,
)
from ppreid_dist.losses.privacy import bounded, unbounded, wrong_person_floor
from ppreid_dist.losses.reconstruction import ReconstructionConfig, reconstruction_distance
from ppreid_dist.models.critic import Critic, CriticConfig
from ppreid_dist.models.ema import Ema
from ppreid_dist.models.generator import Generator, GeneratorConfig
from ppreid_dist.models.seeding import seeded
from ppreid_dist.pixels import resize
from ppreid_dist.settings import Settings, option
from ppreid_dist.training.adversary import Adversary, Exposure, Metrics, View
from ppreid_dist.training.engine import Engine
from ppreid_dist.training.feed import Feed
from ppreid_dist.training.optimiser import OptimiserConfig
from ppreid_dist.training.player import Player
from ppreid_dist.transfer import to_device

_WEIGHTS, _TURN, _ANSWER = 31, 32, 33  # tags of what is drawn from the seed


@dataclass(kw_only=True)
class LazyConfig(Settings):
    mode: str = option(
        "snapshot",
        "what the extractor plays: a snapshot taken each period once the live module has caught up; a module updated "
        "rarely (ablation: masks); its moving average; the live module; the live module, which learns from the same "
        "pictures at the same time (ablation: gradient reversal in one step)",
        choices=("snapshot", "rare", "ema", "none", "one_step"),
    )
    period: int = option(
        20,
        "played rounds between snapshots, or between rare updates; a round is played in one of privacy.every extractor "
        "steps",
        at_least=1,
    )
    catch_up: int = option(60, "most reversal steps spent on catching up at a period's end", at_least=1)
    window: int = option(20, "reversal steps over which progress is judged", at_least=2)
    tolerance: float = option(0.01, "caught up when the error fell by less than this share over a window", at_least=0)
    ema_decay: float = option(0.99, "decay of the mode ema", at_least=0, less_than=1)
    restart: int = option(
        0,
        "of the mode snapshot: after so many the reversal begins anew, with warm_steps to catch up; 0 is never",
        at_least=0,
    )
    pool: int = option(
        0,
        "of the mode snapshot: so many snapshots before the newest are kept, and the extractor plays whichever of them "
        "all errs least",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("pool", "restart"):
            if getattr(self, key) and self.mode != "snapshot":
                raise ConfigError(f"{key}: is for the mode snapshot, which {self.mode} isn't")


@dataclass(kw_only=True)
class ReversalConfig(Settings):
    size: tuple[int, int] = option((128, 64), "height and width of the pictures that the reversal draws")
    batch: int = option(64, "distinct people in a reversal step, over all ranks", at_least=2)
    warm_steps: int = option(600, "most reversal steps before the game begins, the extractor frozen", at_least=1)
    steps: int = option(1, "reversal steps to each played round", at_least=1)
    generator: GeneratorConfig = option(GeneratorConfig(), "")
    critic: CriticConfig = option(CriticConfig(), "")
    adversarial: AdversarialConfig = option(AdversarialConfig(), "")
    reconstruction: ReconstructionConfig = option(ReconstructionConfig(), "")
    gradient: str = option(
        "rec",
        "what the extractor works against: the reconstruction alone, or all that the generator of gan minimises, which "
        "is how surely the critic finds it out, too",
        choices=("rec", "full_gan"),
    )
    generator_optimiser: OptimiserConfig = option(OptimiserConfig(lr=1e-3, beta2=0.99, weight_decay=0.0), "")
    critic_optimiser: OptimiserConfig = option(OptimiserConfig(lr=1e-3, beta1=0.0, beta2=0.99, weight_decay=0.0), "")
    lazy: LazyConfig = option(LazyConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("generator_optimiser", "critic_optimiser"):
            schedule = getattr(self, key)
            if schedule.warmup or schedule.decay != "none":
                raise ConfigError(f"{key}: warmup and decay aren't for the reversal, whose learning rate is constant")
        if self.gradient == "full_gan" and self.adversarial.kind != "non_saturating":
            raise ConfigError("gradient: full_gan needs adversarial.kind=non_saturating, whose loss is never negative")


class ReversalAdversary(Adversary):
    """Generator (and critic) with the lazy update. ``feed`` gives the turn's distinct people."""

    def __init__(
        self,
        kind: str,
        config: ReversalConfig,
        *,
        extractor: Player,
        engine: Engine,
        feed: Feed,
        seed: int,
        bounded_loss: bool,
        perceive: Callable[[Tensor], Tensor] | None,
    ):
        self.kind, self.config, self.feed, self.seed = kind, config, feed, seed  # type: ignore[misc]
        self.engine, self.bounded_loss, self._perceive = engine, bounded_loss, perceive
        self.adversarial = kind == "gan"
        self.noise_dim = config.generator.noise_dim if self.adversarial else 0
        generator, critic = self._untrained(extractor.module.store.dim)
        self.generator = Player("generator", generator, config.generator_optimiser, engine)
        twice = config.adversarial.regulariser == "r1"
        self.critic = (
            Player("critic", critic, config.critic_optimiser, engine, twice=twice) if self.adversarial else None
        )
        lazy = config.lazy.mode
        self.snapshot = self.generator.held.copy() if lazy == "snapshot" else None
        self.pool = [self.generator.held.copy() for _ in range(config.lazy.pool)]
        self.judging = self.critic if config.gradient == "full_gan" else None
        self.judge = self.judging.held.copy() if self.judging is not None and lazy == "snapshot" else None
        self.lagged = extractor.held.copy() if lazy == "snapshot" else None
        self.ema = Ema(self.generator.held.copy(), config.lazy.ema_decay) if lazy == "ema" else None
        self.met: tuple[Tensor, Tensor] | None = None  # of the mode one_step: features and pictures of the last loss
        self.turns = 0  # reversal steps done
        self.rounds = 0  # played, not all of the extractor's steps
        self.snapshots = 0  # taken

    def _untrained(self, dim: int, *renewal: int) -> tuple[Generator, Critic]:
        """Generator and critic that have learnt nothing, others for every number of the renewal."""
        config = self.config
        with seeded(self.seed, _WEIGHTS, *renewal):
            generator = Generator(dim, size=config.size, width=config.generator.width, noise_dim=self.noise_dim)
            critic = Critic(
                dim,
                size=config.size,
                width=config.critic.width,
                spectral_norm=config.adversarial.regulariser == "spectral_norm",
            )
        return generator, critic

    # --- step A ---------------------------------------------------------------------------------------------

    def prepare(self, extractor: Player) -> Metrics:
        self._take_lagged(extractor)
        metrics = self._until_plateau(self.lagged or extractor.module, self.config.warm_steps)
        self._take_snapshot()
        if self.ema is not None:  # or the game would begin against one that has learnt nothing
            self.ema.module.load_state_dict(self.generator.held.weights())
        return metrics

    def respond(self, extractor: Player, step: int) -> Metrics:
        lazy, boundary = self.config.lazy, self.rounds % self.config.lazy.period == 0
        first = self.rounds == 0
        self.rounds += 1
        metrics: Metrics = {}
        if lazy.mode == "snapshot" and boundary and not first:  # the first follows a snapshot: see prepare
            self._take_lagged(extractor)
            renewed = lazy.restart > 0 and self.snapshots % lazy.restart == 0
            if renewed:
                # On a GPU the latest answer is late: of a gradient that wasn't finite all weights are to be kept.
                self.engine.watch.settle()
                for player, untrained in zip(
                    self.players, self._untrained(extractor.module.store.dim, self.snapshots), strict=False
                ):
                    player.renew(untrained)
            most = self.config.warm_steps if renewed else lazy.catch_up
            metrics = self._until_plateau(self.lagged or extractor.module, most)
            self._take_snapshot()
            return metrics
        if lazy.mode == "one_step" or (lazy.mode == "rare" and not boundary):
            return metrics
        for _ in range(self.config.steps):
            metrics = self._turn(self.lagged or extractor.module)
            if self.ema is not None:
                self.ema.update(self.generator.held.weights())
        return metrics

    def follow(self, step: int) -> Metrics:
        # What a gradient reversal layer does: the extractor's step and this one come from one forward of both.
        if self.met is None:
            return {}
        (stored, target), self.met = self.met, None
        return self._learn(stored, target)

    def _take_lagged(self, extractor: Player) -> None:
        if self.lagged is not None:
            self.lagged.load_state_dict(extractor.held.weights())

    def _take_snapshot(self) -> None:
        if self.snapshot is not None:
            if self.pool and self.snapshots:
                self.pool[(self.snapshots - 1) % len(self.pool)].load_state_dict(self.snapshot.state_dict())
            self.snapshot.load_state_dict(self.generator.held.weights())
            if self.judging is not None and self.judge is not None:
                self.judge.load_state_dict(self.judging.held.weights())
            self.snapshots += 1

    def _until_plateau(self, extractor: nn.Module, most: int) -> Metrics:
        """Turns until a window's mean error falls by less than the tolerance, ``most`` at the most."""
        window, before, errors = self.config.lazy.window, float("inf"), []
        for turn in range(1, most + 1):
            errors.append(self._turn(extractor)["error"])
            if turn % window == 0 or turn == most:
                # Averaged over ranks, so that all of them stop at the same turn.
                now = float(distributed.mean_over_ranks(torch.stack(errors).mean()))
                if now > before * (1 - self.config.lazy.tolerance):
                    break
                before, errors = now, []
        return {"error": now, "turns": float(turn)}

    def _turn(self, extractor: nn.Module) -> dict[str, Tensor]:
        """One step of critic and generator against a frozen extractor."""
        batch = self.feed[self.turns]
        with torch.no_grad(), self.engine.autocast():
            stored = extractor(batch.clean_B3HW).stored_BD
        return self._learn(stored, resize(batch.clean_B3HW, self.config.size))

    def _learn(self, stored: Tensor, target: Tensor) -> dict[str, Tensor]:
        noise = self._noise((_TURN, self.turns), len(target), target.device)
        self.engine.watch.fed = {"batch_of": self.kind, "batch": target, "features": stored}
        metrics: dict[str, Tensor] = {}
        if self.critic is not None:
            metrics["critic"] = self._critic_step(target, stored, noise)
        with self.generator.active() as forward:
            with self.engine.autocast():
                drawn = forward(stored, noise)
                error = self._distance(drawn, target).mean()
                loss = error
                if self.critic is not None:
                    score = self.critic.module(drawn, stored)
                    loss = loss + generator_loss(score, self.config.adversarial)
            self.generator.step(loss, progress=1.0)
        self.turns += 1
        return {**metrics, "error": error.detach()}

    def _critic_step(self, target: Tensor, stored: Tensor, noise: Tensor | None) -> Tensor:
        assert self.critic is not None
        options = self.config.adversarial
        with torch.no_grad(), self.engine.autocast():
            drawn = self.generator.module(stored, noise)
        real = target.detach()
        with self.critic.active() as forward:
            with self.engine.autocast():
                # Real and drawn in one batch: one forward, one backward, whatever engine wraps the critic.
                scores = forward(torch.cat([real, drawn.to(real.dtype)]), torch.cat([stored, stored]))
                real_score, drawn_score = scores.chunk(2)
                loss = critic_loss(real_score, drawn_score, options)
            if r1_due(self.turns, options):
                # Through the bare critic: the gradient inside R1 would look like the step's own to the wrapper's hooks.
                real = real.clone().requires_grad_()
                loss = loss + r1_penalty(self.critic.module(real, stored), real, options)
            self.critic.step(loss, progress=1.0)
        return loss.detach()

    def _noise(self, key: tuple[int, int], rows: int, device: torch.device) -> Tensor | None:
        if self.noise_dim == 0:
            return None
        total = rows * distributed.world_size()
        noise = np.random.default_rng([self.seed, *key]).standard_normal((total, self.noise_dim), dtype=np.float32)
        return to_device(torch.from_numpy(noise[distributed.rank_rows(total)]), device)

    # --- step B ---------------------------------------------------------------------------------------------

    @property
    def opponent(self) -> nn.Module:
        """What the extractor plays, or with a pool the newest of what it may play."""
        return self.snapshot or (self.ema.module if self.ema is not None else self.generator.module)

    def loss(self, shown: Exposure, step: int) -> Tensor:
        if self.config.lazy.mode == "one_step":
            # A copy: what a CUDA graph gave is overwritten when the next one begins.
            self.met = (shown.stored_BD.detach().clone(), shown.clean_B3hw)
        noise = self._noise((_ANSWER, step), len(shown.stored_BD), shown.stored_BD.device)
        drawn = self._strongest(shown, noise)(shown.stored_BD, noise)
        distance = self._distance(drawn, shown.clean_B3hw)
        floor = wrong_person_floor(drawn, shown.clean_B3hw, shown.labels_B, self._distance)
        if self.judging is not None:
            distance = distance + self._found_out(drawn, shown.stored_BD)
            floor = floor + wrong_person_floor(drawn, shown.stored_BD.detach(), shown.labels_B, self._found_out)
        return bounded(distance, floor) if self.bounded_loss else unbounded(distance, floor)

    def _strongest(self, shown: Exposure, noise: Tensor | None) -> nn.Module:
        """Of the opponent and the pool's snapshots, who errs least on the rows of all ranks."""
        known = [self.opponent, *self.pool[: max(0, self.snapshots - 1)]]
        if len(known) == 1:
            return known[0]
        with torch.no_grad():
            errors = [self._distance(each(shown.stored_BD, noise), shown.clean_B3hw).mean() for each in known]
            return known[int(distributed.mean_over_ranks(torch.stack(errors)).argmin())]

    def _found_out(self, drawn: Tensor, stored: Tensor) -> Tensor:
        """By the critic as it was when the opponent was taken, or is; of a wrong person's feature it is the floor."""
        assert self.judging is not None
        return found_out((self.judge or self.judging.module)(drawn, stored), self.config.adversarial)

    def _distance(self, drawn: Tensor, target: Tensor) -> Tensor:
        return reconstruction_distance(drawn, target, self.config.reconstruction, self._perceive)

    def view(self) -> View | None:
        return _GeneratorView(self.generator.held.alone() if self.opponent is self.generator.module else self.opponent)

    # --- state ----------------------------------------------------------------------------------------------

    @property
    def players(self) -> list[Player]:
        return [self.generator] + ([self.critic] if self.critic is not None else [])

    @property
    def frozen(self) -> dict[str, nn.Module]:
        averaged = self.ema.module if self.ema else None
        modules = {"snapshot": self.snapshot, "judge": self.judge, "lagged": self.lagged, "ema": averaged}
        modules |= {f"pool{place}": module for place, module in enumerate(self.pool)}
        return {name: module for name, module in modules.items() if module is not None}

    def counters(self) -> dict[str, Any]:
        return {"turns": self.turns, "rounds": self.rounds, "snapshots": self.snapshots}

    def restore(self, counters: dict[str, Any]) -> None:
        self.turns, self.rounds, self.snapshots = (counters[key] for key in ("turns", "rounds", "snapshots"))


class _GeneratorView(View):
    def __init__(self, generator: nn.Module):
        self._generator = generator

    @torch.no_grad()
    def reconstruct(self, features_ND: Tensor) -> Tensor:
        return torch.cat(
            [self._generator(f_BD) for f_BD in features_ND.split(256)]
        )  # without noise: the mean's picture
