"""The regression decoder: a convolutional generator without noise, trained until held-out people gain no more.

Shapes: N its own pictures, M features to reverse, B batch, D feature dim, K view dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from ppreid_dist.attacks.base import held_out_error, picture_size, register, to_uint8
from ppreid_dist.attacks.expected import Expected
from ppreid_dist.attacks.plateau import DescentConfig, Learner, RecipeConfig, Split, StepsConfig, Trainee, race
from ppreid_dist.attacks.recogniser import Recogniser, likeness_loss
from ppreid_dist.kernels import kernel_ridge
from ppreid_dist.losses.reconstruction import PixelLossConfig, pixel_distance
from ppreid_dist.models.generator import Generator
from ppreid_dist.models.seeding import seeded
from ppreid_dist.settings import option

RIDGES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]  # of the linear map that a decoder begins with
MAPPED = 2000  # pictures at most that this map is fitted on


@dataclass(kw_only=True)
class DrawingConfig(DescentConfig):
    """What a decoder is trained for."""

    loss: PixelLossConfig = option(PixelLossConfig(), "")
    likeness: float = option(
        0.1,
        "weight of 1 - cosine between what attack.recogniser sees in the reconstruction and in its picture; 0: it is "
        "not asked, and the decoder begins with drawn weights",
        at_least=0,
    )


@dataclass(kw_only=True)
class DecoderConfig(DrawingConfig, StepsConfig):
    """The same with how it is trained."""


@dataclass(kw_only=True)
class RegressionConfig(DecoderConfig, RecipeConfig):
    """The same with the features and networks that are tried."""


class Opponent(Protocol):
    """Whoever makes the decoder's task more than regression: a critic."""

    def loss(self, fake_B3hw: Tensor, features_BK: Tensor) -> Tensor:
        """What is added to the decoder's loss."""

    def learn(self, real_B3hw: Tensor, fake_B3hw: Tensor, features_BK: Tensor) -> None:
        """The opponent's own step."""


def as_stored(features_MD: Tensor) -> Tensor:
    """No preparation."""
    return features_MD


class Decoder(Trainee):
    """A generator from one view of the features to pictures; where it has an ``opponent``, against that too, and where
    it has a ``recogniser``, to pictures in which that sees what it sees in the real ones, from the start on that
    ``attacks.inverse`` describes.

    It is given ``prepared_ND``, what ``prepare`` makes of stored features; ``label`` says how, in words. They may be
    what the recogniser is ``expected`` to see: then it begins as the recogniser's inverse itself. ``by_likeness`` its
    error is what the recogniser misses in the pictures alone, where there is one: by that weights are kept, and it is
    compared with others. By pixels, of which a decoder soon draws more, it would unlearn whom it draws.
    """

    network: Generator
    opponent: Opponent | None = None
    recogniser: Recogniser | None = None
    by_likeness = False

    def __init__(
        self,
        prepared_ND: Tensor,
        pictures_N3hw: Tensor,
        split: Split,
        *,
        view: str,
        width: int,
        lr: float,
        noise_dim: int,
        config: DrawingConfig,
        seed: int,
        recogniser: Recogniser | None = None,
        prepare: Callable[[Tensor], Tensor] = as_stored,
        label: str = "",
        expected: bool = False,
        by_likeness: bool = False,
    ):
        self.by_likeness = by_likeness
        self.about = f"{label}{view} features, width {width}, lr {lr:g}"
        self.prepare, self.noise_dim, self.loss = prepare, noise_dim, config.loss

        def build(dim: int) -> Generator:
            with seeded(seed, width):
                return Generator(dim, picture_size(pictures_N3hw), width, noise_dim)

        super().__init__(prepared_ND, pictures_N3hw, split, view=view, lr=lr, build=build, config=config, seed=seed)
        self.ask(recogniser, config.likeness)
        if self.recogniser is not None and self.recogniser.inverse is not None:
            self._begin_as(self.recogniser.inverse(width), expected)

    def _begin_as(self, inverse: Generator, expected: bool) -> None:
        """Draw what ``inverse`` draws of what the recogniser is likely to see: by a linear map of the features, or
        where these are that already, of them as they are."""
        self.network.draw_as(inverse, *(self._identity(inverse) if expected else self._linear()))
        self.go_on_from(self.network.state_dict())
        self.look()  # if all that it learns is for the worse, it stays as it was

    def _linear(self) -> tuple[Tensor, Tensor]:
        some = torch.randperm(len(self.x_FK), generator=torch.Generator().manual_seed(0))[:MAPPED]
        known, seen = self.x_FK[some], self.seen_FD[some]
        linear = [kernel_ridge.LINEAR]
        width, ridge, _ = kernel_ridge.choose(known, seen, self.view(self.held), self.held_seen, linear, RIDGES)
        return kernel_ridge.fit(known, seen, width=width, ridge=ridge).affine()

    def _identity(self, inverse: Generator) -> tuple[Tensor, Tensor]:
        matrix_EE = torch.eye(inverse.feature_dim, device=self.x_FK.device)
        return matrix_EE, matrix_EE.new_zeros(inverse.feature_dim)

    def ask(self, recogniser: Recogniser | None, weight: float) -> None:
        """From now on by that weight for what the recogniser, if there is one, sees in the pictures."""
        if weight and recogniser is not None:
            self.recogniser, self.likeness = recogniser, weight
            self.seen_FD, self.held_seen = map(recogniser.of_pictures, (self.pictures_F3hw, self.held_pictures))

    @property
    def name(self) -> str:
        return self.about

    def step(self, x_BK: Tensor, real_B3hw: Tensor) -> None:
        fake_B3hw = self.network(x_BK, self.normal((len(x_BK), self.noise_dim)))
        loss = pixel_distance(fake_B3hw, real_B3hw, self.loss).mean()
        if self.recogniser is not None:
            loss = loss + self.likeness * likeness_loss(self.recogniser(fake_B3hw), self.seen_FD[self.rows_B])
        if self.opponent is not None:
            loss = loss + self.opponent.loss(fake_B3hw, x_BK)
        self.descend(loss)
        if self.opponent is not None:
            self.opponent.learn(real_B3hw, fake_B3hw.detach(), x_BK)

    def error(self) -> float:
        drawn = self.draw(self.held)
        error = held_out_error(drawn, self.held_pictures)
        if self.recogniser is None:
            return error
        unlike = float(likeness_loss(self.recogniser.of_pictures(to_uint8(drawn)), self.held_seen))
        return unlike if self.by_likeness else error + self.likeness * unlike

    @torch.no_grad()
    def draw(self, prepared_MD: Tensor) -> Tensor:
        """Pictures (M,3,h,w) of features that are prepared already."""
        return torch.cat([self.average.module(x_BK) for x_BK in self.view(prepared_MD).split(256)])

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        """Pictures (M,3,h,w) of features as they are stored."""
        return self.draw(self.prepare(features_MD))


def decoders(
    prepared_ND: Tensor,
    pictures_N3hw: Tensor,
    split: Split,
    *,
    noise_dim: int,
    config: RegressionConfig,
    recogniser: Recogniser | None,
    seed: int,
    prepare: Callable[[Tensor], Tensor] = as_stored,
    label: str = "",
    for_people: bool = False,
) -> list[Callable[[], Decoder]]:
    """Entrants for a race: one of every view, width and learning rate.

    Where finding people counts more than pixels, ``for_people``, they race by what the recogniser sees in their
    pictures, and, if there is an inverse, one of every width and learning rate draws what the recogniser is likely to
    see (``attacks.expected``).
    """
    enter = partial(
        Decoder, prepared_ND, pictures_N3hw, split,
        noise_dim=noise_dim, config=config, recogniser=recogniser, seed=seed, prepare=prepare, label=label,
        by_likeness=for_people,
    )  # fmt: skip
    choices = product(config.views, config.widths, config.lrs)
    found: list[Callable[[], Decoder]] = [partial(enter, view=view, width=width, lr=lr) for view, width, lr in choices]
    if for_people and recogniser is not None and recogniser.inverse is not None:
        expected = cache(partial(Expected, prepared_ND, pictures_N3hw, split, recogniser))

        def enter_expecting(width: int, lr: float) -> Decoder:
            return Decoder(
                expected()(prepared_ND), pictures_N3hw, split, view="stored", width=width, lr=lr, noise_dim=noise_dim,
                config=config, recogniser=recogniser, seed=seed, prepare=lambda x_MD: expected()(prepare(x_MD)),
                label=f"{label}as the recogniser may see them, ", expected=True, by_likeness=True,
            )  # fmt: skip

        found += [partial(enter_expecting, width, lr) for width, lr in product(config.widths, config.lrs)]
    return found


@register
class Regression(Learner):
    """The decoder alone."""

    name = "regression"
    asks_positions = True
    config: RegressionConfig

    @property
    def asks_recogniser(self) -> bool:
        return self.config.likeness > 0

    def learn(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, *, seed: int, say: Callable[[str], None]
    ) -> Decoder:
        self.decoder = race(self.entrants(features_ND, pictures_N3hw, split, seed), self.config, say)
        return self.decoder

    def entrants(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, seed: int
    ) -> list[Callable[[], Decoder]]:
        """All decoders of which the best in a short trial is trained to its plateau."""
        enter = partial(
            decoders, pictures_N3hw=pictures_N3hw, split=split,
            noise_dim=0, config=self.config, recogniser=self.recogniser, seed=seed,
        )  # fmt: skip
        found = enter(features_ND)
        if self.positions is not None:
            found += enter(self.positions(features_ND), prepare=self.positions, label="what was coded, ")
        return found

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        return self.decoder.reconstruct(features_MD)
