"""The training loop, from the first step to the last, through stops and resumes.

    RUN/
        config.yaml             the resolved configuration
        metrics.jsonl           a row every ``training.log_every`` steps, and one for every probe
        checkpoints/            see ``checkpoint``
        model/                  the finished extractor, see ``models.extractor``
        result.json             what the run took: steps, images, seconds, images per second, data wait

Everything derives from the number of the step: which pictures, how they are augmented, the noise, λ and the learning
rate. A resumed run therefore continues as if it had never stopped.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ppreid_dist import distributed
from ppreid_dist.errors import RunError
from ppreid_dist.models.ema import Ema
from ppreid_dist.settings import Settings, option
from ppreid_dist.storage import write_json
from ppreid_dist.training.adversary import Adversary, View
from ppreid_dist.training.checkpoint import (
    CheckpointFolder,
    load_module,
    load_optimiser,
    load_tree,
    optimiser_state,
    write_tree,
)
from ppreid_dist.training.engine import Engine
from ppreid_dist.training.feed import Feed
from ppreid_dist.training.player import NotFinite, Player
from ppreid_dist.training.step import ExtractorStep, PrivacyConfig
from ppreid_dist.training.tracking import Averages, rewind_metrics

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
        0.0, "decay of the averaged extractor that is kept and probed; 0 = keep the last", at_least=0, at_most=1
    )


class Runner:
    """Joins players, adversaries, feeds and files. ``probe`` measures, and never changes, the game."""

    def __init__(
        self,
        *,
        folder: Path,
        config: TrainingConfig,
        privacy: PrivacyConfig,
        batch_rows: int,
        engine: Engine,
        extractor: Player,
        adversaries: list[Adversary],
        step: ExtractorStep,
        labelled: Feed,
        strangers: Feed | None,
        reversal: Feed | None,
        probe: Probe | None,
        probe_every: int,
        identity: dict[str, Any],
        progress: bool = True,
    ):
        self.folder, self.config, self.privacy, self.engine = folder, config, privacy, engine
        self.extractor, self.adversaries, self.extractor_step = extractor, adversaries, step
        self.labelled, self.strangers, self.reversal = labelled, strangers, reversal
        self.probe, self.probe_every, self.progress = probe, probe_every, progress
        self.identity = identity  # what must be equal for a resume: configuration, data fingerprint
        self.batch_rows = batch_rows
        self.total = max(1, config.images // batch_rows)
        self.game_from = round(self.total * config.warm) if adversaries else self.total
        self.checkpoints = CheckpointFolder(folder, config.keep)
        self.ema = Ema(extractor.module, config.ema) if config.ema else None
        self.step, self.prepared, self.elapsed, self.waited = 0, False, 0.0, 0.0
        self.averages = Averages(engine.device)

    # --- the loop -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train from ``self.step`` to the end; returns what result.json holds. RunError if a gradient is not finite."""
        bar = tqdm(
            total=self.total, initial=self.step, desc=f"train {self.folder.name}", unit="step",
            disable=not (self.progress and self.engine.is_main), mininterval=1.0,
        )  # fmt: skip
        started = time.perf_counter()
        done_before, elapsed_before = self.step, self.elapsed
        try:
            while self.step < self.total:
                self._round()
                self.step += 1
                self.elapsed = elapsed_before + time.perf_counter() - started
                if self.step % self.config.log_every == 0 or self.step == self.total:
                    bar.set_postfix(self._log(), refresh=False)
                bar.update()
                if self.probe is not None and self._probe_due():
                    self._run_probe()
                if self.step % self.config.checkpoint_every == 0 or self.step == self.total:
                    self.save()
        except NotFinite as error:
            raise self._stopped(error) from None
        finally:
            bar.close()
            for feed in self._feeds():
                feed.close()
        return self._finish(done_before)

    def _round(self) -> None:
        strength, strangers = 0.0, None
        frozen = self.extractor.module
        if self.step >= self.game_from:
            if not self.prepared:
                for adversary in self.adversaries:
                    self.averages.note(adversary.prepare(frozen), adversary.kind)
                self.prepared = True
            for adversary in self.adversaries:
                self.averages.note(adversary.respond(frozen, self.step), adversary.kind)
            strength = self.strength(self.step)
            strangers = self.strangers[self.step] if self.strangers is not None else None
        terms = self.extractor_step(
            self.labelled[self.step], strangers, step=self.step, strength=strength, progress=self.step / self.total
        )
        if self.ema is not None:
            self.ema.update(self.extractor.module)
        self.averages.note(terms | {"privacy/strength": torch.tensor(strength)})

    @property
    def finished(self) -> Any:
        """The extractor to keep: the averaged one, where there is one."""
        return self.extractor.module if self.ema is None else self.ema.module

    def strength(self, step: int) -> float:
        """λ at an extractor step: 0 in the warm-up, then a linear ramp to ``privacy.weight``."""
        game = self.total - self.game_from
        through = (step - self.game_from + 1) / max(1.0, self.privacy.ramp * game)
        return self.privacy.weight * min(1.0, max(0.0, through)) if step >= self.game_from else 0.0

    # --- what is seen of it ---------------------------------------------------------------------------------

    def _log(self) -> dict[str, str]:
        means = self.averages.take()
        speed = {"images_per_second": self.step * self.batch_rows / self.elapsed, "data_wait": self._data_wait()}
        self.engine.accelerator.log({"images": self.step * self.batch_rows, **means, **speed}, step=self.step)
        return {name.removeprefix("loss/"): f"{mean:.3f}" for name, mean in means.items() if name.startswith("loss/")}

    def _feeds(self) -> list[Feed]:
        return [feed for feed in (self.labelled, self.strangers, self.reversal) if feed is not None]

    def _data_wait(self) -> float:
        """The share of the time in which this process stood waiting for pictures."""
        return (self.waited + sum(feed.waited for feed in self._feeds())) / max(self.elapsed, 1e-9)

    def _probe_due(self) -> bool:
        played = self.step - self.game_from
        return played > 0 and (played % self.probe_every == 0 or self.step == self.total)

    def _run_probe(self) -> None:
        assert self.probe is not None
        if self.engine.is_main:
            views = [view for adversary in self.adversaries if (view := adversary.view()) is not None]
            found = self.probe(self.finished, views, self.step)
            values = {f"probe/{name}": value for name, value in found.items()}
            self.engine.accelerator.log({"images": self.step * self.batch_rows, **values}, step=self.step)
        self.engine.wait()

    def _finish(self, done_before: int) -> dict[str, Any]:
        images = self.step * self.batch_rows
        result = {
            "steps": self.step, "images": images, "seconds": round(self.elapsed, 1),
            "images_per_second": round(images / max(self.elapsed, 1e-9), 1),
            "data_wait": round(self._data_wait(), 4), "processes": distributed.world_size(),
            "resumed_at": done_before,
        }  # fmt: skip
        if self.engine.is_main:
            write_json(self.folder / "result.json", result)
        self.engine.wait()
        return result

    # --- state ----------------------------------------------------------------------------------------------

    def _players(self) -> dict[str, Player]:
        learned = {f"{a.kind}.{player.name}": player for a in self.adversaries for player in a.players}
        return {"extractor": self.extractor, **learned}

    def _frozen(self) -> dict[str, nn.Module]:
        averaged = {"extractor.ema": self.ema.module} if self.ema is not None else {}
        return averaged | {f"{a.kind}.{name}": module for a in self.adversaries for name, module in a.frozen.items()}

    def state(self) -> dict[str, Any]:
        """Everything the game depends on, as one tree of tensors and plain values."""
        return {
            "step": self.step, "prepared": self.prepared, "elapsed": self.elapsed,
            "waited": self._data_wait() * self.elapsed, "identity": self.identity,
            "adversaries": {adversary.kind: adversary.counters() for adversary in self.adversaries},
            "modules": {name: player.module.state_dict() for name, player in self._players().items()},
            "frozen": {name: module.state_dict() for name, module in self._frozen().items()},
            "optimisers": {name: optimiser_state(player.optimiser) for name, player in self._players().items()},
        }  # fmt: skip

    def save(self) -> None:
        """A checkpoint of this step, written by the main process while the others wait."""
        if self.engine.is_main:
            self.checkpoints.save(self.step, self.state())
        self.engine.wait()

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none. RunError if it belongs to another run."""
        newest = self.checkpoints.latest()
        if newest is None:
            self._rewind(-1)
            return False
        saved = load_tree(newest)
        for key, value in self.identity.items():
            if saved["identity"].get(key) != value:
                was = saved["identity"].get(key)
                raise RunError(f"{newest}: can't resume, {key} was {was!r} and is now {value!r}")
        for name, player in self._players().items():
            load_module(player.module, saved["modules"][name], newest)
            load_optimiser(player.optimiser, saved["optimisers"][name])
        for name, module in self._frozen().items():
            load_module(module, saved["frozen"][name], newest)
        for adversary in self.adversaries:
            adversary.restore(saved["adversaries"][adversary.kind])
        self.step, self.prepared = saved["step"], saved["prepared"]
        self.elapsed, self.waited = saved["elapsed"], saved["waited"]
        self._rewind(self.step)
        return True

    def _rewind(self, step: int) -> None:
        if self.engine.is_main:
            rewind_metrics(self.folder / "metrics.jsonl", step)
        self.engine.wait()

    def _stopped(self, error: NotFinite) -> RunError:
        """Keep the batch, the loss terms and all weights from before the step, and say where."""
        target = self.folder / f"not_finite_step_{self.step:08d}"
        if self.engine.is_main and not target.exists():
            batch = self.labelled[self.step]
            write_tree(
                target,
                {**self.state(), "terms": self.extractor_step.terms, "batch": batch.x_B3HW, "labels": batch.labels_B},
            )
        self.engine.wait()
        return RunError(f"step {self.step}: {error} is not finite; nothing was updated; look at {target}")
