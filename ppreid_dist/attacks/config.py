"""The settings of an attack: who attacks, with how many people, and each attacker's own."""

from dataclasses import dataclass, replace

from ppreid_dist.attacks.adaptive import Adaptive, AdaptiveConfig
from ppreid_dist.attacks.attribute import AttributeConfig
from ppreid_dist.attacks.auxiliary import AuxiliaryConfig
from ppreid_dist.attacks.averaged import AveragedConfig
from ppreid_dist.attacks.base import ATTACKERS, HELD_OUT_PEOPLE
from ppreid_dist.attacks.diffusion import DiffusionConfig
from ppreid_dist.attacks.gan import GanConfig
from ppreid_dist.attacks.inverse import InverseConfig
from ppreid_dist.attacks.isomap import IsomapConfig
from ppreid_dist.attacks.linkage import LinkageConfig
from ppreid_dist.attacks.perceptual import PerceptualConfig
from ppreid_dist.attacks.plateau import Learner, cut
from ppreid_dist.attacks.recogniser import RecogniserConfig
from ppreid_dist.attacks.regression import RegressionConfig
from ppreid_dist.attacks.retrieval import RetrievalConfig
from ppreid_dist.attacks.ridge import RidgeConfig
from ppreid_dist.attacks.unfolded import UnfoldedConfig
from ppreid_dist.attacks.whitebox import WhiteBoxConfig
from ppreid_dist.errors import ConfigError
from ppreid_dist.models.onnx_model import OnnxConfig
from ppreid_dist.settings import Settings, option

ALONE = tuple(name for name in ATTACKERS if name != Adaptive.name)
"""Who needs no generator that the victim was trained against."""


@dataclass(kw_only=True)
class AttackConfig(Settings):
    attackers: list[str] = option(
        ["retrieval", "ridge", "regression", "averaged", "isomap", "unfolded", "gan", "adaptive"],
        "who attacks",
        choices=tuple(ATTACKERS),
    )
    curve_attackers: list[str] = option(
        ["ridge", "regression"], "who attacks with fewer people too", choices=tuple(ATTACKERS), may_be_empty=True
    )
    people: list[int] = option(
        [80, 160, 320, 0], "numbers of the attackers' own people; 0 is all, and more than there are is all", at_least=0
    )
    curve_steps: int | None = option(
        None,
        "gradient steps, at most, of an attacker with fewer people; 0: decoders stay as they begin (attack.inverse), "
        "which is nearly as much of people for a fraction of the time",
        at_least=0,
    )
    leaked: list[str] = option(
        ["gallery"],
        "splits whose stored features attackers have beside the queries', without pictures, as whoever steals a "
        "database has",
        choices=("gallery", "unlabelled", "train"),
        may_be_empty=True,
    )
    min_utility: float = option(
        0.95, "share of the control's mAP below which a run has no utility-reversibility ratio", at_least=0, at_most=1
    )
    rerank: bool = option(
        False,
        "how well both sides match people is counted after k-reciprocal re-ranking, as a gallery does that has it",
    )
    resamples: int = option(2000, "bootstrap resamples of the identities", at_least=10)
    seed: int = option(0, "everything is drawn from it", at_least=0, at_most=2**63 - 1)
    seeds: int = option(
        1,
        "trainings of every attacker that is drawn at random; its held-out people choose the one that counts",
        at_least=1,
    )
    auxiliary: AuxiliaryConfig = option(AuxiliaryConfig(), "")
    retrieval: RetrievalConfig = option(RetrievalConfig(), "")
    ridge: RidgeConfig = option(RidgeConfig(), "")
    regression: RegressionConfig = option(RegressionConfig(), "")
    averaged: AveragedConfig = option(AveragedConfig(), "")
    isomap: IsomapConfig = option(IsomapConfig(), "")
    unfolded: UnfoldedConfig = option(UnfoldedConfig(), "")
    recogniser: RecogniserConfig = option(RecogniserConfig(), "")
    inverse: InverseConfig = option(InverseConfig(), "")
    gan: GanConfig = option(GanConfig(), "")
    diffusion: DiffusionConfig = option(DiffusionConfig(), "")
    adaptive: AdaptiveConfig = option(AdaptiveConfig(), "")
    attribute: AttributeConfig = option(AttributeConfig(), "")
    whitebox: WhiteBoxConfig = option(WhiteBoxConfig(), "")
    linkage: LinkageConfig = option(LinkageConfig(), "")
    onnx: OnnxConfig = option(OnnxConfig(), "")
    perceptual: PerceptualConfig = option(PerceptualConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.attackers) == {Adaptive.name}:
            raise ConfigError("attackers: adaptive has no counterpart on the control; name another beside it")
        if strangers := set(self.curve_attackers) - set(self.attackers):
            raise ConfigError(f"curve_attackers: {min(strangers)} is not one of the attackers")
        if set(self.curve_attackers) == {Adaptive.name}:
            raise ConfigError("curve_attackers: adaptive has no counterpart on the control; name another beside it")
        least = 2 * HELD_OUT_PEOPLE
        if few := [n for n in self.people if 0 < n < least]:
            raise ConfigError(f"people: {few[0]} are too few: an attacker needs {least} (0 is all)")
        for name in self.curve_attackers if self.curve_steps == 0 else []:
            own = ATTACKERS[name](getattr(self, name))
            if isinstance(own, Learner) and not (own.asks_recogniser or name == Adaptive.name):
                raise ConfigError(f"curve_steps: 0 leaves {name} untrained")
        if unknown := set(self.auxiliary.attackers) - set(ATTACKERS):
            raise ConfigError(f"auxiliary.attackers: {min(unknown)!r} is not one of {', '.join(ATTACKERS)}")

    def on_curve(self) -> "AttackConfig":
        """The same for attackers with fewer people."""
        if self.curve_steps is None:
            return self
        return replace(self, **{name: cut(getattr(self, name), self.curve_steps) for name in self.curve_attackers})
