"""How many steps a training may take, and how long an attack is said to take before it begins."""

import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from attack_world import make_people, small_config
from torch import Tensor

from ppreid_dist.attacks.averaged import AveragedConfig
from ppreid_dist.attacks.base import ATTACKERS
from ppreid_dist.attacks.estimate import estimate, most_steps, seconds
from ppreid_dist.attacks.gan import GanConfig
from ppreid_dist.attacks.plateau import Learner, PlateauConfig, Split, cut
from ppreid_dist.attacks.regression import Decoder, RegressionConfig
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError


def test_the_steps_that_a_training_may_take() -> None:
    plateau, short = PlateauConfig(max_steps=1000), PlateauConfig(max_steps=50)
    start = RegressionConfig(views=["raw", "whitened"], widths=[16], lrs=[1e-2, 1e-3], trial_steps=70, plateau=plateau)
    assert most_steps(start) == 4 * 70 + 1000
    assert most_steps(replace(start, views=["raw"], lrs=[1e-2])) == 1000  # nothing to race
    raced = {"trial_steps": 70, "plateau": plateau, "views": ["raw"], "widths": [16], "lrs": [1e-2], "neighbours": [2]}
    assert most_steps(AveragedConfig(**raced, agreement=[0.0, 1.0, 2.0])) == 3 * 70 + 1000
    gan = GanConfig(start=start, plateau=short)
    assert most_steps(gan) == 1280 + 50
    assert most_steps(cut(gan, 3)) == 4 * 3 + 3 + 3 and cut(gan, 3).start.lrs == start.lrs

    class Slow(Learner):
        """A tenth of a second to begin with, and a hundredth a step."""

        def learn(self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, **_: object) -> Decoder:
            time.sleep(0.1 + 0.01 * most_steps(self.config))
            return cast(Decoder, SimpleNamespace(best=0.0, still_falling=0.0))

        def reconstruct(self, features_MD: Tensor) -> Tensor:
            raise NotImplementedError

    config, (known, features) = small_config(regression=start), make_people(0, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTACKERS, "regression", Slow)
        found = seconds("regression", config, features, known.images_N3HW, known.pids_N)
    assert found == pytest.approx(0.1 + 0.01 * 1280, rel=0.2)


def test_with_fewer_people_training_can_be_shorter(
    aux: tuple[Pictures, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound that is larger than the training's own changes nothing, and nobody is left untrained unless it begins
    with something."""
    start = small_config(60, likeness=0.1)
    assert start.on_curve() is start and replace(start, curve_steps=60).on_curve().ridge == start.ridge
    config = replace(start, attackers=["ridge", "regression", "diffusion"], curve_attackers=["regression"])
    shorter = replace(config, curve_steps=30).on_curve()
    assert shorter.regression.plateau == replace(start.regression.plateau, max_steps=30)
    assert shorter.regression.trial_steps == start.regression.trial_steps == 20
    assert (shorter.diffusion, shorter.inverse) == (start.diffusion, start.inverse)
    assert most_steps(replace(config, curve_steps=0).on_curve().regression) == 0
    for name, own in (("diffusion", {}), ("regression", {"regression": replace(start.regression, likeness=0.0)})):
        with pytest.raises(ConfigError, match=rf"^curve_steps: 0 leaves {name} untrained$"):
            replace(config, curve_steps=0, curve_attackers=[name], **own)
    known, features = aux
    few = Counter({("regression", True): 2, ("regression", False): 1})
    few_only = replace(config, curve_steps=0, recogniser=replace(config.recogniser, epochs=1))
    # Half a second a step.
    monkeypatch.setattr(
        "ppreid_dist.attacks.estimate.seconds", lambda name, its, *_: most_steps(getattr(its, name)) / 2
    )
    line = estimate(few, few_only, features, known.images_N3HW, known.pids_N, numbers=2)
    assert most_steps(start.regression) == 100
    assert "regression with fewer people 2 × 0 s, regression 1 × 50 s, recogniser 2 ×" in line
