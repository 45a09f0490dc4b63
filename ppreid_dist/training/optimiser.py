"""A player's optimiser: its settings, what it has learnt, and the learning rate as a function of progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError
from ppreid_dist.kernels import choice, nvidia_apex
from ppreid_dist.settings import Settings, option

_TORCHS = (torch.optim.Adam, torch.optim.AdamW)


@dataclass(kw_only=True)
class OptimiserConfig(Settings):
    name: str = option("adam", "optimiser", choices=("adam", "adamw"))
    lr: float = option(3.5e-4, "learning rate after the warm-up", more_than=0)
    beta1: float = option(0.9, "Adam's first decay", at_least=0, less_than=1)
    beta2: float = option(0.999, "Adam's second decay", at_least=0, less_than=1)
    eps: float = option(1e-8, "Adam's least denominator: gradients far below it hardly move a weight", more_than=0)
    weight_decay: float = option(5e-4, "weight decay", at_least=0)
    warmup: float = option(
        0.0, "share of the training over which lr rises linearly from a hundredth", at_least=0, at_most=1
    )
    decay: str = option("none", "how lr falls afterwards", choices=("none", "steps", "cosine"))
    decay_at: list[float] = option(
        [0.33, 0.58],
        "shares of the training at which `steps` divides lr by 10",
        at_least=0,
        at_most=1,
        may_be_empty=True,
    )
    clip: float = option(10.0, "largest norm of the gradient; 0 = unlimited", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_at != sorted(self.decay_at):
            raise ConfigError(f"decay_at: {self.decay_at} must ascend")


def make_optimiser(parameters: Sequence[nn.Parameter], config: OptimiserConfig) -> torch.optim.Optimizer:
    """Adam or AdamW, in the form that ``kernels.choice`` has for the parameters' device."""
    form = choice.of("adam", parameters[0].device).implementation
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if form == "apex":
        return nvidia_apex.fused_adam(parameters, decoupled=config.name == "adamw", **settings)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(parameters, fused=form == "fused", foreach=form == "foreach", **settings)


def moments(optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Of every parameter, by its number: step, exp_avg, exp_avg_sq, whatever the form; empty before the first step."""
    saved = optimiser.state_dict()
    if isinstance(optimiser, _TORCHS):
        return {str(number): known for number, known in saved["state"].items()}
    steps = {number: float(group.get("step", 0)) for group in saved["param_groups"] for number in group["params"]}
    return {str(number): {"step": torch.tensor(steps[number]), **known} for number, known in saved["state"].items()}


def load_moments(optimiser: torch.optim.Optimizer, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Set what :func:`moments` gave, of whatever form of Adam.

    The fused forms walk through a parameter and its moments side by side in memory, and would silently take moments
    that lie otherwise, as any do that come from a file, for those of other weights: they are laid as their parameter.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    groups = optimiser.state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    for number, known in saved.items():
        like = parameters[int(number)]
        state[int(number)] = {key: torch.empty_like(like).copy_(t) for key, t in known.items() if key != "step"}
        if isinstance(optimiser, _TORCHS):
            state[int(number)]["step"] = known["step"].clone()
    if not isinstance(optimiser, _TORCHS):  # Apex's counts once a group
        for group in groups:
            steps = [int(saved[str(number)]["step"]) for number in group["params"] if str(number) in saved]
            group["step"] = max(steps, default=0)
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def learning_rate(config: OptimiserConfig, progress: float) -> float:
    """The learning rate at ``progress`` (0 to 1) through the training: a pure function, so resume needs no state."""
    lr = config.lr
    if progress < config.warmup:
        return lr * (0.01 + 0.99 * progress / config.warmup)
    if config.decay == "steps":
        return lr * 0.1 ** sum(progress >= at for at in config.decay_at)
    if config.decay == "cosine":
        through = (progress - config.warmup) / max(1e-9, 1 - config.warmup)
        return lr * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * through))))
    return lr
