"""What every attacker is, and what all of them share: a split by people, views of the features, one error.

An attacker owns exported features, and the pictures of its own auxiliary people among them, nothing else: no weights,
no gradients, no picture of anybody it is tested on. An attacker that is too weak makes everything look private, so each
chooses its capacity and its view of the features on people it held out of its own pool.

Shapes: N its own pictures, M features to reverse, L leaked entries, B batch, D feature dim, E dim of their span, K view
dim, h w pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.errors import ConfigError
from ppreid_dist.losses.reconstruction import PixelLossConfig, pixel_distance
from ppreid_dist.pixels import to_float

if TYPE_CHECKING:
    from ppreid_dist.attacks.recogniser import Recogniser

Progress = Callable[[str], None]
VIEWS = ("raw", "whitened")
HELD_OUT_SHARE, HELD_OUT_PEOPLE = 0.2, 4
SHOWN = 16  # tested people whose reconstructions are kept for the report
ERROR = PixelLossConfig(l1=1.0, ssim=0.5)


class Attacker(ABC):
    """Learns to turn stored features back into pictures. ``config`` is the attacker's own settings.

    ``leaked_LD``, set before :meth:`fit` by whoever has them, are the features of a stolen database: whom it is to
    reconstruct, ``asked`` of them, who come first, and all others in it, without pictures. Most attackers make nothing
    of them. ``recogniser``, set before :meth:`fit` too where ``asks_recogniser`` says so, is a ReID model that was
    trained on the attacker's own people; ``positions`` finds the numbers behind stored codes
    (``attacks.unfolded.positions``). ``people_N`` says who is on its pictures where the groups that :meth:`fit`
    holds out together aren't people.
    ``held_out`` is the error on its held-out people that :meth:`fit` ended with, where one is needed: trainings of one
    attacker are chosen between by it. ``still_falling`` is the share by which it fell over the last quarter of the
    training: more than hardly any was no plateau. NaN elsewhere.
    """

    name: ClassVar[str]
    held_out = still_falling = float("nan")
    leaked_LD: Tensor | None = None
    asked = 0
    recogniser: "Recogniser | None" = None
    positions: Callable[[Tensor], Tensor] | None = None
    asks_positions = False  # whether it reads ``positions``, where features are codes
    people_N: np.ndarray | None = None

    def __init__(self, config: Any):
        self.config = config

    @property
    def asks_recogniser(self) -> bool:
        """Whether it needs a ``recogniser``."""
        return False

    @abstractmethod
    def fit(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        pids_N: np.ndarray,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        """Learn from stored features (float, any device), their pictures (uint8, same device) and identities.

        The same seed gives the same attacker (on CPU to the bit). ConfigError naming ``attack.people`` where
        there are too few identities to hold some out.
        """

    @abstractmethod
    def reconstruct(self, features_MD: Tensor) -> Tensor:
        """Pictures (M,3,h,w), float in [0,1], of the people whose features these are."""

    def effort(self, pictures: int) -> float:
        """What the time of :meth:`fit` grows in proportion to, for one that makes no steps."""
        return float(pictures) ** 2

    def guesses(self, features_MD: Tensor) -> Tensor:
        """(S,M,3,h,w): the pictures whose mean :meth:`reconstruct` gives; one for whoever doesn't guess."""
        return self.reconstruct(features_MD)[None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One attacker, trained once and tested on every query picture: by axis, its scores of each, higher leaking more.

    ``kid`` is the kernel distance of all reconstructions from all real pictures, NaN where no network was given for it.
    ``best`` is the mean SSIM of the best of several guesses at each picture, NaN where there is one guess only. Only
    the picture itself can tell which is the best, so it is a bound on what choosing could bring, not an attack.
    ``held_out`` is the attacker's own error on the people it held out, ``still_falling`` how much of it the last
    quarter of the training took off.
    """

    scores: dict[str, np.ndarray]
    l1: float
    psnr: float
    kid: float
    best: float
    seconds: float
    shown: Tensor  # uint8 (SHOWN or fewer,3,h,w): the rows ``Bench.shown``
    held_out: float = float("nan")
    still_falling: float = float("nan")


ATTACKERS: dict[str, type[Attacker]] = {}


def register(attacker: type[Attacker]) -> type[Attacker]:
    """Class decorator: make an attacker known under its name."""
    ATTACKERS[attacker.name] = attacker
    return attacker


def split_people(pids_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to choose on; no identity is in both.

    A fifth of the identities is held out, at least four, and at least as many must remain.
    """
    people = np.unique(pids_N)
    held = max(HELD_OUT_PEOPLE, round(HELD_OUT_SHARE * len(people)))
    if len(people) < 2 * HELD_OUT_PEOPLE:
        raise ConfigError(f"attack.people: {len(people)} people are too few, an attacker needs {2 * HELD_OUT_PEOPLE}")
    held_out = np.isin(pids_N, np.random.default_rng([seed, 0x5117]).permutation(people)[:held])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def permute_people(pids_N: np.ndarray, seed: int) -> np.ndarray:
    """For every row the row of a picture of another person: identities go round a random circle.

    All features of one person get pictures of one other person, so that what the pairs teach is the prior alone, and
    a split by identity is one of the pictured people too.
    """
    circle = np.random.default_rng([seed, 0xF1]).permutation(np.unique(pids_N))
    pairs = np.empty(len(pids_N), dtype=np.int64)
    for pid, other in zip(circle, np.roll(circle, 1), strict=True):
        mine, theirs = np.flatnonzero(pids_N == pid), np.flatnonzero(pids_N == other)
        pairs[mine] = np.resize(theirs, len(mine))
    return pairs


@dataclass(frozen=True)
class View:
    """An affine map of the features, scaled so that those it was fitted on have a mean square norm of 1; without a
    matrix it leaves them as they are."""

    mean_D: Tensor
    matrix_DK: Tensor | None

    def __call__(self, features_MD: Tensor) -> Tensor:
        return features_MD.float() if self.matrix_DK is None else (features_MD.float() - self.mean_D) @ self.matrix_DK

    @property
    def dim(self) -> int:
        return len(self.mean_D) if self.matrix_DK is None else self.matrix_DK.shape[1]


def fit_view(name: str, features_ND: Tensor, *, shrinkage: float = 0.1) -> View:
    """``stored``: as they are. ``raw``: centred and scaled. ``whitened``: by principal axes too, each divided by its
    standard deviation. Where there are fewer features than they have numbers, both keep what lies in their span, by
    coordinates in it: of the rest nothing can be learnt.

    Whitening undoes an extractor that hides what it knows in directions of small variance. The variances are
    shrunk towards their mean (weight ``shrinkage``), else the smallest axes, which are noise, would dominate.
    """
    x_ND = features_ND.float()
    if name == "stored":
        return View(torch.zeros_like(x_ND[0]), None)
    mean_D = x_ND.mean(0)
    x_ND = x_ND - mean_D
    if len(x_ND) < x_ND.shape[1]:
        span_DE = torch.linalg.qr(x_ND[:-1].mT)[0]  # about their mean the last one is what the others make it
    else:
        span_DE = torch.eye(x_ND.shape[1], device=x_ND.device)
    matrix_DK = span_DE
    if name == "whitened":
        _, deviations_K, axes_KE = torch.linalg.svd(x_ND @ span_DE, full_matrices=False)
        variances_K = deviations_K.square() / len(x_ND)
        kept = variances_K > 1e-10 * variances_K.max()
        kept[0] = True  # of features that are all the same, one axis on which they are
        axes_KE, variances_K = axes_KE[kept], variances_K[kept]
        shrunk_K = ((1 - shrinkage) * variances_K + shrinkage * variances_K.mean()).clamp_min(1e-24)
        matrix_DK = span_DE @ (axes_KE.T / shrunk_K.sqrt())
    power = (x_ND @ matrix_DK).square().sum(1).mean().clamp_min(1e-12)
    return View(mean_D, matrix_DK / power.sqrt())


def to_uint8(images_N3hw: Tensor) -> Tensor:
    """Pictures in [0,1] as they are stored, so that nothing is read off digits that no picture has."""
    return (images_N3hw * 255).round().to(torch.uint8)


def picture_size(pictures_N3hw: Tensor) -> tuple[int, int]:
    """Height and width."""
    return pictures_N3hw.shape[2], pictures_N3hw.shape[3]


def held_out_error(images_N3hw: Tensor, pictures_N3hw: Tensor) -> float:
    """What attackers choose by: mean of L1 and (1 - SSIM) / 2 between reconstructions and uint8 pictures."""
    distances = [
        pixel_distance(image_B3hw, to_float(picture_B3hw), ERROR)
        for image_B3hw, picture_B3hw in zip(images_N3hw.split(512), pictures_N3hw.split(512), strict=True)
    ]
    return float(torch.cat(distances).mean())
