"""The training loop, from the first step to the last, through stops and resumes.

    RUN/
        config.yaml             the resolved configuration
        metrics.jsonl           a row every ``training.log_every`` steps, and one for every probe
        checkpoints/            see ``checkpoint``
        model/                  the finished extractor, see ``models.extractor``
        result.json             what the run took: steps, images, seconds, images per second, data wait; the engine
        stop, stopped           of stops, see ``stopping``
        trace.json, costs.json  where asked for, see ``trace``
        wandb.json  wandb/      where asked for, see ``tracking``

Everything derives from the number of the step: which pictures, how they are augmented, the noise, λ, the learning
rate, and what a backbone with stochastic depth or dropout drops (which is each process's own). A resumed run therefore
continues as if it had never stopped, bit for bit on CPUs with one or two processes, and elsewhere up to the order of
sums, in which DDP and some of torch's kernels are free; only the row of metrics.jsonl in which it stopped is a mean
over what came after.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppreid_dist import distributed
from ppreid_dist.errors import LostError, RunError, Stopped
from ppreid_dist.files import write_json
from ppreid_dist.models.ema import Ema
from ppreid_dist.models.seeding import seed_of
from ppreid_dist.progress import progress_bar
from ppreid_dist.settings import Settings, option
from ppreid_dist.training.adversary import Adversary, View
from ppreid_dist.training.engine import Engine
from ppreid_dist.training.feed import Feed, FeedBatch
from ppreid_dist.training.finite import NotFinite
from ppreid_dist.training.player import Player
from ppreid_dist.training.state import GameState, Position
from ppreid_dist.training.step import ExtractorStep, PrivacyConfig
from ppreid_dist.training.stopping import StopRequests
from ppreid_dist.training.trace import Trace, TraceConfig, part
from ppreid_dist.training.tracking import Averages, rewind_metrics

_ROUND = 41  # tag of what is drawn from the seed
Probe = Callable[[nn.Module, list[View], int], dict[str, float]]


@dataclass(kw_only=True)
class TrainingConfig(Settings):
    images: int = option(
        1_550_000, "labelled pictures to train on, repeats counted; a multiple of the batch is taken", at_least=1
    )
    warm: float = option(0.4, "share of the training by identity losses alone, before the game", at_least=0, at_most=1)
    log_every: int = option(20, "steps between rows of the log", at_least=1)
    checkpoint_every: int = option(500, "steps between checkpoints; the last step always makes one", at_least=1)
    keep: int = option(2, "checkpoints kept", at_least=1)
    ema: float = option(
        0.0, "decay of the averaged extractor that is kept and probed; 0 = keep the last", at_least=0, less_than=1
    )
    trace: TraceConfig = option(TraceConfig(), "")


class Runner:
    """Joins players, adversaries, feeds and files.

    ``probe`` measures, and never changes, the game; the main process has one if ``probe_every`` isn't 0.
    """

    def __init__(
        self,
        *,
        folder: Path,
        seed: int,
        config: TrainingConfig,
        privacy: PrivacyConfig,
        batch_rows: int,
        engine: Engine,
        extractor: Player,
        adversaries: list[Adversary],
        step: ExtractorStep,
        labelled: Feed,
        strangers: Feed | None,
        reversals: list[Feed],
        probe: Probe | None,
        probe_every: int,
        must_match: Mapping[str, Any],
        unsaid: Mapping[str, Any],
        progress: bool = True,
    ):
        self.folder, self.seed, self.config, self.privacy, self.engine = folder, seed, config, privacy, engine
        self.extractor, self.adversaries, self.extractor_step = extractor, adversaries, step
        self.labelled, self.strangers, self.reversals = labelled, strangers, reversals
        self.probe, self.probe_every, self.progress = probe, probe_every, progress
        self.batch_rows = batch_rows
        self.total = max(1, config.images // batch_rows)
        self.game_from = round(self.total * config.warm) if adversaries else self.total
        self.ema = Ema(extractor.held.copy(), config.ema) if config.ema else None
        self.state = GameState(
            folder,
            config.keep,
            engine=engine,
            players=[extractor, *step.beside],
            adversaries=adversaries,
            ema=self.ema,
            must_match=must_match,
            unsaid=unsaid,
        )
        self.at = Position()
        self.requests = StopRequests(folder, engine.device)
        self.averages = Averages(engine.device)
        self.trace = Trace(config.trace if engine.is_main else TraceConfig(), folder, engine.device)

    @property
    def step(self) -> int:
        """Extractor steps that are done."""
        return self.at.step

    # --- the loop -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train from ``self.step`` to the end; returns what result.json holds.

        RunError if a gradient is not finite, LostError if another process is gone; Stopped, with a checkpoint, if asked
        to stop.
        """
        bar = progress_bar(
            total=self.total, initial=self.step, desc=f"train {self.folder.name}", unit="step",
            shown=self.progress and self.engine.is_main,
        )  # fmt: skip
        started = time.perf_counter()
        done_before, elapsed_before = self.step, self.at.elapsed
        self.requests.listen()
        try:
            while self.step < self.total:
                self.trace.at(self.step)
                self._round()
                self.at.step += 1
                self.at.elapsed = elapsed_before + time.perf_counter() - started
                if self.step % self.config.log_every == 0 or self.step == self.total:
                    bar.set_postfix(self._log(), refresh=False)
                bar.update()
                if self._probe_due():
                    self._run_probe()
                stop, last = self.requests.agreed(), self.step == self.total
                if stop or last or self.step % self.config.checkpoint_every == 0:
                    self.save()
                if stop:
                    self.requests.honour()
                if stop and not last:
                    raise Stopped(f"{self.folder}: asked to stop, saved at step {self.step} of {self.total}")
        except NotFinite as error:
            raise self._not_finite(error) from None
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"{self.folder}: step {self.step}: the GPU's memory is full; engine.gradient_checkpointing=true needs "
                "less, and so do a larger engine.accumulate, fewer data.identities_per_batch or privacy.ridge.strangers"
            ) from error
        except RuntimeError as error:
            if not distributed.lost_contact(error):
                raise
            raise LostError(f"{self.folder}: step {self.step}: {distributed.reason(error)}") from error
        finally:
            self.requests.close()
            bar.close()
            for feed in self._feeds():
                feed.close()
            self.trace.close(self.step)  # last, and it raises nothing: what ended the run is what counts
        return self._finish(done_before)

    def _round(self) -> None:
        self.engine.watch.step = self.step
        # For networks that draw as they train, which torch lets them do from its global generators only. Each process
        # has numbers of its own, or all would drop the same rows of their parts of the batch.
        torch.manual_seed(seed_of(self.seed, _ROUND, self.step, distributed.rank()))
        strength, strangers = self.strength(self.step), None
        if self.step >= self.game_from and not self.at.prepared:
            for adversary in self.adversaries:
                self.averages.note(adversary.prepare(self.extractor), adversary.kind)
            self.at.prepared = True
        if self._plays(self.step):
            for adversary in self.adversaries:
                with part(f"{adversary.kind} learns"):
                    self.averages.note(adversary.respond(self.extractor, self.step), adversary.kind)
            strangers = self._pictures(self.strangers, self._played(self.step))
        labelled = self._pictures(self.labelled, self.step)
        assert labelled is not None
        with part("extractor step"):
            terms = self.extractor_step(
                labelled, strangers, step=self.step, strength=strength, progress=self.step / self.total
            )
        if self._plays(self.step):
            for adversary in self.adversaries:
                with part(f"{adversary.kind} learns"):
                    self.averages.note(adversary.follow(self.step), adversary.kind)
        if self.ema is not None:
            self.ema.update(self.extractor.held.weights())
        self.averages.note({**terms, "privacy/strength": strength})

    @staticmethod
    def _pictures(feed: Feed | None, number: int) -> FeedBatch | None:
        if feed is None:
            return None
        with part("pictures"):
            return feed[number]

    def _plays(self, step: int) -> bool:
        return bool(self.adversaries) and step >= self.game_from and (step - self.game_from) % self.privacy.every == 0

    def _played(self, step: int) -> int:
        """The number of this round among those in which the game is played."""
        return (step - self.game_from) // self.privacy.every

    def finished(self) -> Any:
        """The extractor to keep: the averaged one, where there is one. Asked of every process, used by one."""
        return self.extractor.held.alone() if self.ema is None else self.ema.module

    def strength(self, step: int) -> float:
        """λ at an extractor step: 0 in the warm-up, then a linear ramp to ``privacy.weight``. Where the game is played
        in one of several steps only, it counts as many times in that one, and the mean is the same."""
        if not self._plays(step):
            return 0.0
        game = self.total - self.game_from
        through = (step - self.game_from + 1) / max(1.0, self.privacy.ramp * game)
        return self.privacy.weight * self.privacy.every * min(1.0, through)

    # --- what is seen of it ---------------------------------------------------------------------------------

    def _log(self) -> dict[str, str]:
        self.engine.watch.settle()  # the means are waited for anyway
        means = self.averages.take()
        speed = {"images_per_second": self.step * self.batch_rows / self.at.elapsed, "data_wait": self._data_wait()}
        self.engine.accelerator.log({"images": self.step * self.batch_rows, **means, **speed}, step=self.step)
        return {name.removeprefix("loss/"): f"{mean:.3f}" for name, mean in means.items() if name.startswith("loss/")}

    def _feeds(self) -> list[Feed]:
        return [self.labelled, *([self.strangers] if self.strangers else []), *self.reversals]

    def _waited(self) -> float:
        return self.at.waited + sum(feed.waited for feed in self._feeds())

    def _data_wait(self) -> float:
        """The share of the time in which this process stood waiting for pictures."""
        return self._waited() / max(self.at.elapsed, 1e-9)

    def _probe_due(self) -> bool:
        played = self.step - self.game_from
        return self.probe_every > 0 and played > 0 and (played % self.probe_every == 0 or self.step == self.total)

    def _run_probe(self) -> None:
        self.engine.watch.settle()
        extractor, views = self.finished(), [adversary.view() for adversary in self.adversaries]
        if self.engine.is_main:
            assert self.probe is not None
            found = self.probe(extractor, [view for view in views if view is not None], self.step)
            values = {f"probe/{name}": value for name, value in found.items()}
            self.engine.accelerator.log({"images": self.step * self.batch_rows, **values}, step=self.step)
        self.engine.wait()

    def _finish(self, done_before: int) -> dict[str, Any]:
        images = self.step * self.batch_rows
        result = {
            "steps": self.step, "images": images, "seconds": round(self.at.elapsed, 1),
            "images_per_second": round(images / max(self.at.elapsed, 1e-9), 1),
            "data_wait": round(self._data_wait(), 4), "processes": distributed.world_size(),
            "engine": self.engine.kind, "precision": self.engine.precision, "resumed_at": done_before,
        }  # fmt: skip
        if self.engine.is_main:
            write_json(self.folder / "result.json", result)
        self.engine.wait()
        return result

    # --- stops and resumes ----------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step. NotFinite if its gradients weren't."""
        self.engine.watch.settle()
        self.state.save(replace(self.at, waited=self._waited()))

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none. RunError if it belongs to another run."""
        found = self.state.restore()
        self.at = found or self.at
        if self.engine.is_main:
            rewind_metrics(self.folder / "metrics.jsonl", found.step if found else -1)
        self.engine.wait()
        return found is not None

    def _not_finite(self, error: NotFinite) -> RunError:
        """Keep what the gradient came from (the first process's rows) and all weights from before it, and say where."""
        target = self.state.keep_failed(replace(self.at, step=error.step), error.fed)
        return RunError(
            f"step {error.step}: {error} is not finite; nothing was updated; for the batch of the "
            f"{error.fed['batch_of']} and all weights look at {target}"
        )
