"""A world for attackers: people of two colours, features that tell them, a judge that looks at them; and attackers of
seconds for it."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.averaged import AveragedConfig
from ppreid_dist.attacks.base import ATTACKERS, Attacker
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.diffusion import DiffusionConfig
from ppreid_dist.attacks.gan import GanConfig
from ppreid_dist.attacks.inverse import InverseConfig
from ppreid_dist.attacks.isomap import IsomapConfig
from ppreid_dist.attacks.judging import Judge, Look
from ppreid_dist.attacks.plateau import PlateauConfig
from ppreid_dist.attacks.regression import RegressionConfig
from ppreid_dist.attacks.ridge import RidgeConfig
from ppreid_dist.attacks.unfolded import UnfoldedConfig
from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.images import scores
from ppreid_dist.evaluation.ranking import rank_queries

SIZE = (16, 8)
LOOK_DIM, FEATURE_DIM = 6, 24


def make_people(first: int, count: int, shots: int = 4, *, seed: int = 0) -> tuple[Pictures, Tensor]:
    """People of two colours (upper and lower body) before cameras' backgrounds, and features that are their colours.

    A picture's camera is its shot; background, place and light differ from picture to picture.
    """
    rng = np.random.default_rng([seed, first])
    mixing = np.random.default_rng(99).standard_normal((LOOK_DIM + 2, FEATURE_DIM))
    images, masks, codes = [], [], []
    for look in rng.random((count, LOOK_DIM)):
        for _ in range(shots):
            picture = np.full((3, *SIZE), rng.uniform(0.3, 0.7, (3, 1, 1)))
            left, mask = int(rng.integers(1, 4)), np.zeros((1, *SIZE))
            picture[:, 2:9, left : left + 4] = look[:3, None, None]
            picture[:, 9:15, left : left + 4] = look[3:, None, None]
            mask[:, 2:15, left : left + 4] = 1
            images.append(picture * rng.uniform(0.9, 1.1))
            masks.append(mask)
            codes.append(np.concatenate([look - 0.5, 0.2 * rng.standard_normal(2)]))
    features = torch.from_numpy(np.array(codes) @ mixing).float()
    pictures = Pictures(
        images_N3HW=torch.from_numpy((np.array(images).clip(0, 1) * 255).round().astype(np.uint8)),
        masks_N1HW=torch.from_numpy(np.array(masks).astype(np.uint8)),
        pids_N=np.repeat(np.arange(first, first + count), shots),
        camids_N=np.tile(np.arange(shots), count),
        keys=[f"{first + i // shots:04d}_c{i % shots}" for i in range(count * shots)],
        attributes={},
    )
    return pictures, torch.nn.functional.normalize(features, dim=1)


def colours(images_N3hw: Tensor) -> Tensor:
    """A judge that looks at the mean colours of the picture's middle, above and below."""
    middle = images_N3hw[:, :, :, 2:6]
    return torch.cat([middle[:, :, 2:9].mean((2, 3)), middle[:, :, 9:15].mean((2, 3))], dim=1) - 0.5


def colour_judge(people: Pictures, rows: np.ndarray, look: Look = colours, name: str = "colours") -> Judge:
    """A judge that knows these rows as its gallery."""
    return Judge(name=name, look=look, gallery_GD=look(people.images_N3HW[rows].float() / 255), note="")


def judged_ap(images_Q3hw: Tensor, people: Pictures) -> float:
    ranking = rank_queries(
        colours(images_Q3hw),
        colours(people.images_N3HW.float() / 255),
        query_pids=people.pids_N,
        gallery_pids=people.pids_N,
        query_camids=people.camids_N,
        gallery_camids=people.camids_N,
    )
    return ranking.summary()["mAP"]


def person_l1(images_Q3hw: Tensor, people: Pictures) -> float:
    return float(scores(images_Q3hw, people.images_N3HW, people.masks_N1HW)["l1"].mean())


def see_colours(images_B3hw: Tensor) -> Tensor:
    """An extractor that can be descended through: the mean colours of 4×2 fields, mixed, of unit norm (B, 24)."""
    fields_BC = torch.nn.functional.avg_pool2d(images_B3hw, 4).flatten(1) - 0.5
    mixing_CD = torch.from_numpy(np.random.default_rng(98).standard_normal((fields_BC.shape[1], FEATURE_DIM))).float()
    return torch.nn.functional.normalize(fields_BC @ mixing_CD, dim=1)


NAMES = ["retrieval", "ridge", "regression", "averaged", "isomap", "unfolded", "gan"]
if find_spec("diffusers"):
    NAMES.append("diffusion")


def small_config(steps: int = 60, likeness: float = 0.0, **changes: object) -> AttackConfig:
    # Of all decoders; the trial is for those that race.
    recipe: dict[str, Any] = {
        "likeness": likeness,
        "widths": [16],
        "lrs": [1e-2],
        "trial_steps": max(1, steps // 3),
        "batch": 16,
        "ema": 0.9,
        "plateau": PlateauConfig(max_steps=steps, evaluate_every=20, patience=2, falls=1),
    }
    start = RegressionConfig(**recipe)
    inverse = InverseConfig(likeness=likeness, epochs=1, lr=1e-2, batch=16, ema=0.9)
    config = AttackConfig(
        people=[0],
        curve_attackers=["ridge"],
        resamples=200,
        ridge=RidgeConfig(widths=[1.0, 2.0, 0.0], ridges=[1e-4, 1e-2, 1.0, 100.0]),
        regression=start,
        inverse=inverse,
        averaged=AveragedConfig(**recipe, agreement=[1.0], neighbours=[2]),
        isomap=IsomapConfig(**recipe, neighbours=[8, 20], coordinates=[6, 12]),
        unfolded=UnfoldedConfig(
            **recipe,
            agreement=[1.0],
            neighbours=[8],
            coordinates=[6, 12],
            averaged=[0, 2],
            smoothed=[0, 4],
            layout_steps=60,
        ),
        diffusion=DiffusionConfig(
            views=["raw"],
            widths=[16],
            lrs=[4e-3],
            batch=32,
            ema=0.95,
            looks=4,
            samples=2,
            sampling_steps=6,
            plateau=PlateauConfig(max_steps=10 * steps // 3, evaluate_every=50, patience=2, falls=1),
        ),
        gan=GanConfig(start=start, noise_dim=4, plateau=PlateauConfig(max_steps=steps // 2, evaluate_every=15)),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def make(name: str, steps: int = 60) -> Attacker:
    return ATTACKERS[name](getattr(small_config(steps), name))
