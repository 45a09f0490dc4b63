"""Everything that a game depends on: written as checkpoints, read back to go on, kept for a look where it broke."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ppreid_dist import distributed
from ppreid_dist.errors import RunError
from ppreid_dist.models.ema import Ema
from ppreid_dist.training.adversary import Adversary
from ppreid_dist.training.checkpoint import CheckpointFolder, load_tree, load_weights, write_tree
from ppreid_dist.training.engine import Engine
from ppreid_dist.training.player import Player


@dataclass(kw_only=True)
class Position:
    """How far a run is."""

    step: int = 0
    prepared: bool = False  # the adversaries have reached a first plateau against the warm extractor
    elapsed: float = 0.0  # seconds of training
    waited: float = 0.0  # of these, seconds in which this process stood waiting for pictures


class GameState:
    """Players, snapshots and counters of one run, as one tree of tensors and plain values.

    ``must_match`` is equal for a resume: settings and data by name; of what a checkpoint says nothing, since it is of
    a version without that setting, ``unsaid`` was the value.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        engine: Engine,
        players: Sequence[Player],
        adversaries: Sequence[Adversary],
        ema: Ema | None,
        must_match: Mapping[str, Any],
        unsaid: Mapping[str, Any],
    ):
        self.folder, self.engine, self.must_match, self.unsaid = folder, engine, dict(must_match), unsaid
        self.adversaries = {adversary.kind: adversary for adversary in adversaries}
        self.players = {player.name: player for player in players} | {
            f"{adversary.kind}.{player.name}": player for adversary in adversaries for player in adversary.players
        }
        self.ema = ema
        self.checkpoints = CheckpointFolder(folder, keep)

    def frozen(self) -> dict[str, nn.Module]:
        """What no optimiser touches: the averaged extractor, snapshots."""
        averaged = {"extractor.ema": self.ema.module} if self.ema is not None else {}
        each = self.adversaries.items()
        return averaged | {f"{kind}.{name}": module for kind, who in each for name, module in who.frozen.items()}

    def tree(self, position: Position) -> dict[str, Any]:
        """The whole game, on the first process, whatever engine plays it. Called by every process: each may have a part
        of it only."""
        return {
            **asdict(position),
            "must match": self.must_match,
            "adversaries": {kind: adversary.counters() for kind, adversary in self.adversaries.items()},
            "modules": {name: player.held.weights(to_save=True) for name, player in self.players.items()},
            "frozen": {name: module.state_dict() for name, module in self.frozen().items()},
            "optimisers": {name: {"state": player.held.moments()} for name, player in self.players.items()},
        }

    def save(self, position: Position) -> None:
        """A checkpoint, written by the main process while the others wait."""
        tree = self.tree(position)
        if self.engine.is_main:
            self.checkpoints.save(position.step, tree)
        self.engine.wait()

    def restore(self) -> Position | None:
        """Go back to the newest whole checkpoint; None if there is none. RunError if it belongs to another run."""
        newest = self._find()
        if newest is None:
            return None
        saved = load_tree(newest)
        for key, value in self.must_match.items():
            if (was := saved["must match"].get(key, self.unsaid.get(key))) != value:
                raise RunError(f"{newest}: can't resume, {key} was {was!r} and is now {value!r}")
        for name, player in self.players.items():
            load_weights(player.held.load_weights, saved["modules"][name], newest)
            player.held.load_moments(saved["optimisers"][name]["state"])
        for name, module in self.frozen().items():
            load_weights(module.load_state_dict, saved["frozen"][name], newest)
        for kind, adversary in self.adversaries.items():
            adversary.restore(saved["adversaries"][kind])
        return Position(**{name: saved[name] for name in asdict(Position())})

    def _find(self) -> Path | None:
        """The first process looks, all of them go back to what it found."""
        found: Path | RunError | None = None
        if self.engine.is_main:
            try:
                found = self.checkpoints.newest_whole()
            except RunError as error:
                found = error
        found = distributed.chosen_by_main(found)
        if isinstance(found, RunError):
            raise found
        return found

    def keep_failed(self, position: Position, seen: Mapping[str, Any]) -> Path:
        """Write all weights from before the step that failed, and what it saw; returns where."""
        target, tree = self.folder / f"not_finite_step_{position.step:08d}", self.tree(position)
        if self.engine.is_main and not target.exists():
            write_tree(target, {**tree, **seen})
        self.engine.wait()
        return target
