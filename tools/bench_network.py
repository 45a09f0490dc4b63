"""What passes between many GPUs in a step, reckoned, not measured: where a training that grows would meet its limit.

Every GPU has its own batch (weak scaling). Collectives are rings in bytes and trees in latency: an all-reduce of b
bytes over n GPUs takes 2 (n - 1) / n b / bandwidth + launch + 2 log2(nodes) hop. The extractor's gradients pass while
its backward runs, which is two thirds of its time; all else waits. The assumptions are arguments.
"""

import argparse
import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ppreid_dist.experiment import Config
from ppreid_dist.models.critic import Critic
from ppreid_dist.models.extractor import Extractor
from ppreid_dist.models.generator import Generator
from ppreid_dist.settings import load_settings

HIDDEN = 2 / 3


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/market1501.yaml", metavar="FILE")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--rows", type=int, default=64, help="labelled pictures of a GPU in a step")
    parser.add_argument("--images-per-second", type=float, default=7000, help="of a GPU that is alone, extractor only")
    parser.add_argument("--inside", type=float, default=350e9, help="bytes a second of a GPU to its node's others")
    parser.add_argument("--between", type=float, default=45e9, help="bytes a second of a GPU to other nodes")
    parser.add_argument("--launch", type=float, default=20e-6, help="seconds of a collective without bytes or hops")
    parser.add_argument("--hop", type=float, default=5e-6, help="seconds to another node")
    parser.add_argument("--flops", type=float, default=2e13, help="a second, float64, of the best response's solver")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="before options that take several words")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    config = load_settings(Config, options.config, options.settings)
    return [_step(options, config, gpus) for gpus in options.gpus]


def _step(options: argparse.Namespace, config: Config, gpus: int) -> dict[str, Any]:
    bandwidth = options.inside if gpus <= options.node else options.between
    latency = options.launch + 2 * math.log2(max(1, gpus / options.node)) * options.hop

    def collective(size: float, times: float = 1.0, passes: float = 2.0) -> float:
        return times * (passes * (gpus - 1) / gpus * size / bandwidth + latency) if gpus > 1 else 0.0

    extractor = Extractor(config.model, num_classes=1000)
    dim, ridge, lazy = extractor.feature_dim, config.privacy.ridge, config.reversal.lazy
    kinds = {adversary.kind for adversary in config.privacy.adversaries} if config.privacy.weight else set()
    norms = sum(isinstance(module, _BatchNorm) for module in extractor.modules())
    played = 1 / config.privacy.every
    strangers = ridge.strangers * played if "ridge" in kinds else 0.0  # of all GPUs together
    compute = (options.rows + strangers / gpus) / options.images_per_second
    waits = {
        "batch norm": collective(0, 2 * norms),
        # The labelled features for the triplet loss, forward and backward.
        "features": collective(4 * gpus * options.rows * dim, 2, 1),
    }
    if "ridge" in kinds:
        both = 4 * ridge.strangers * (dim + 3 * math.prod(ridge.target_size))
        waits["strangers"] = played * (collective(both, 2, 1) + collective(4 * ridge.strangers * dim, 1, 1))
        waits["best response, on every GPU alike"] = played * _flops(config) / options.flops
    if kinds & {"gan", "regression"}:
        noise = config.reversal.generator.noise_dim if "gan" in kinds else 0
        modules: list[nn.Module] = [Generator(dim, config.reversal.size, config.reversal.generator.width, noise)]
        if "gan" in kinds:
            modules.append(Critic(dim, config.reversal.size, config.reversal.critic.width, False))
        steps = played * (config.reversal.steps + lazy.catch_up / lazy.period)
        waits["reversal"] = sum(collective(_bytes(module), steps) for module in modules)
    gradients = collective(_bytes(extractor))
    waits["gradients, not hidden"] = max(0.0, gradients - HIDDEN * options.rows / options.images_per_second)
    whole = compute + sum(waits.values())
    most = max(waits, key=waits.__getitem__)
    return {
        "gpus": gpus,
        "compute_ms": 1e3 * compute,
        "gradients_ms": 1e3 * gradients,
        **{f"{name}_ms": 1e3 * seconds for name, seconds in waits.items()},
        "efficiency": compute / whole,
        "limit": most,
    }


def _bytes(module: nn.Module) -> float:
    return 4.0 * sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _flops(config: Config) -> float:
    """Of one game: every adversary solved to choose, the chosen one again with its gradient (three times as much)."""
    ridge = config.privacy.ridge
    fit = ridge.fit_fraction * ridge.strangers
    test, values = ridge.strangers - fit, 3 * math.prod(ridge.target_size)
    one = fit**3 / 3 + 2 * fit**2 * test + 2 * fit * test * values
    return (len(ridge.views) * len(ridge.widths) * len(ridge.ridges) + 3) * one
