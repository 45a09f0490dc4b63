"""T: what a gallery keeps of an embedding, the feature that a leaked database shows.

Plain, it is the embedding at unit norm. The other kinds are what galleries are told to do against reversal without
training anything; they are put on a finished extractor (``ppreid store``), and serve as rivals of training:

    noise      a Gaussian vector beside it, the same for the same embedding
    adversarial   moved to where the gallery's own decoder errs most (after AdvFace, Wang et al., ECCV 2022); where that
               is turns with the third digit of a feature, so that pictures decoded elsewhere are moved elsewhere
    pca        its projection on the ``dim`` main directions of the training people's features
    rotation   the same after a secret rotation, which keeps every distance
    signs      the signs of ``dim`` secret random projections (Charikar, STOC 2002)
    codes      the signs of ``dim`` secret waves over its main directions: near features agree in most of them;
               beyond a few ``width`` it is lost how far two are apart (Boufounos & Rane, WIFS 2011). Their waves'
               lengths are drawn too, and long ones tell of far distances: whoever has people of his own finds them
               out (``attacks.agreement``). With ``spectrum: shell`` all are equally long
    cells      ``dim`` secret bits, each of the cell in which its main directions lie, between secret walls ``width``
               apart (locality-sensitive hashing; Indyk & Motwani, STOC 1998): features in the same cell have the same
               bit, and of others' cells a bit says nothing. Waves go on beyond where somebody's people are; a hash of
               cells doesn't, so that what it tells is how many bits two features share, and no more

All but ``noise`` at unit norm again. int8 comes last of all. A kind is a class here, under its name in :data:`KINDS`.

Shapes: B batch, N fitted rows, D the embedding's dim, A main directions, S the stored dim.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError
from ppreid_dist.models.generator import Generator
from ppreid_dist.models.seeding import seed_of, seeded
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings, option

PUBLIC_KEY = 0  # for measurements; a gallery takes its own
NOISE_WAVES = 64.0  # of noise, per unit of distance
INT8_MAX = 127
INT8_SIGMAS = 4.0
CELL_WALLS = 16  # directions of walls at most; with fewer a cell would be a slab, of which many are seen


@dataclass(kw_only=True)
class DecoderConfig(Settings):
    """Of adversarial: the gallery's own, trained on the run's training pictures."""

    size: tuple[int, int] = option((64, 32), "height and width of what it draws")
    width: int = option(32, "its width", at_least=8)
    steps: int = option(1500, "its training steps", at_least=1)
    batch: int = option(64, "pictures a step", at_least=2)
    lr: float = option(2e-3, "its learning rate", more_than=0)


@dataclass(kw_only=True)
class StoreConfig(Settings):
    kind: str = option(
        "plain",
        "what is kept of an embedding; all but plain are for `ppreid store`, after training",
        choices=("plain", "noise", "adversarial", "pca", "rotation", "signs", "codes", "cells"),
    )
    strength: float = option(0.5, "the norm of what is added: of noise on average, of adversarial at most", more_than=0)
    ascent: int = option(20, "of adversarial: steps to where the decoder errs most", at_least=1)
    decoder: DecoderConfig = option(DecoderConfig(), "")
    dim: int = option(0, "of pca, signs, codes and cells: the stored dimension; 0 is the embedding's", at_least=0)
    axes: int = option(0, "of codes and cells: the main directions that are coded; 0 is all", at_least=0)
    width: float = option(
        0.5,
        "of codes: features at distance d agree as exp(-d^2 / (2 width^2)) says; of cells: how far apart walls are",
        more_than=0,
    )
    spectrum: str = option(
        "gaussian", "of codes: lengths of the waves, drawn or all the same (shell)", choices=("gaussian", "shell")
    )
    key: int = option(
        PUBLIC_KEY,
        "of noise, rotation, signs, codes and cells: the secret that they are drawn from, of any length; 0 is public, "
        "for measurements only",
        at_least=0,
    )
    quantise: str = option("none", "how what is kept is rounded", choices=("none", "int8"))

    @property
    def in_words(self) -> str:
        """``plain``, ``pca``, ``int8``, ``pca, int8``."""
        parts = [self.kind] * (self.kind != "plain") + [self.quantise] * (self.quantise != "none")
        return ", ".join(parts) or "plain"


class Store(nn.Module):
    """Embeddings (B, D) to stored features (B, S), fp32. This one is ``plain``; :func:`make_store` gives the others.

    ``dim`` is S. What :meth:`fit` learns must be there before it is used.
    """

    uses: tuple[str, ...] = ()
    """The settings, beside ``quantise``, that the kind has."""
    keyed = False
    """Whether ``key`` is all of its secret."""
    needs_features = False
    """Whether :meth:`fit` has something to learn."""
    one_bit = False
    """Whether a number's sign is all that is kept of it."""

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__()
        self.config, self.embedding_dim = config, dim
        self.dim = config.dim or dim if "dim" in self.uses else dim

    def forward(self, embedding_BD: Tensor) -> Tensor:
        stored_BS = self._kept(F.normalize(embedding_BD, dim=1))
        return stored_BS if self.config.quantise == "none" else quantise_int8(stored_BS, self.reach)

    @property
    def reach(self) -> float:
        """What int8 represents at most of a component."""
        return int8_reach(self.dim)

    @property
    def packs(self) -> bool:
        """Whether what is stored takes less than a float32 a number."""
        return self.one_bit or self.config.quantise == "int8"

    def packed(self, stored_BS: Tensor) -> dict[str, Tensor]:
        """What is stored in the space that it needs, without loss; only where it ``packs``.

        Of signs ``features`` (B, ⌈S / 8⌉) uint8, 1 for a positive number, the first in a byte's highest bit, and
        ``dim`` () int64, S: `numpy.unpackbits(features, axis=1, count=dim)`. Of int8 ``features`` (B, S) int8 and
        ``step`` () float32: `features * step`.
        """
        assert self.packs
        stored_BS = stored_BS.detach().cpu()
        if self.one_bit:
            bits = torch.from_numpy(np.packbits((stored_BS > 0).numpy(), axis=1))
            return {"features": bits, "dim": torch.tensor(self.dim)}
        step = torch.tensor(self.reach / INT8_MAX)
        return {"features": (stored_BS / step).round().to(torch.int8), "step": step}

    def _kept(self, unit_BD: Tensor) -> Tensor:
        """(B, S): of an embedding at unit norm."""
        return unit_BD

    def fit(self, plain_ND: Tensor, pictures_N3hw: Tensor | None = None) -> None:
        """Learn from plain features, and from the uint8 pictures behind them, of the decoder's size."""

    def rekeyed(self) -> "Store":
        """The same under another key, or this one, where nothing hangs on a key."""
        return self

    def expected(self, embedding_BD: Tensor) -> Tensor:
        """What an attacker with the extractor compares with what is stored: the same, but for noise. That leaps from
        picture to picture, so that no descent can follow it, and says nothing of them."""
        stored_BS: Tensor = self(embedding_BD)
        return stored_BS


class _Secret(Store):
    """A kind that draws ``secret_AS`` from its key."""

    secret_AS: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__(config, dim)
        # A key makes its secrets again; only what was fitted is to be kept.
        self.register_buffer("secret_AS", self._draw().float(), persistent=False)

    def _draw(self) -> Tensor:
        """Float64 and Gaussian."""
        return torch.special.ndtri(_drawn(self.config.key, "directions", self.embedding_dim, self.dim))

    def rekeyed(self) -> Store:
        if not self.keyed:
            return self
        other = type(self)(dataclasses.replace(self.config, key=self.config.key + 1), self.embedding_dim)
        other.load_state_dict(self.state_dict())
        return other.to(self.secret_AS.device)

    def _noise(self, unit_BD: Tensor) -> Tensor:
        """Gaussian, drawn by the key and the embedding itself, so that it does not hang on what else is in the batch.

        Each component is a wave over the embeddings, so short that features a hundredth apart share nothing, and so
        long that another batch's rounding (1e-6) hardly moves it; its height, evenly spread, is made Gaussian.
        """
        phase_BD = unit_BD.detach().double() @ self.secret_AS.double() * NOISE_WAVES
        even_BD = (2 * (phase_BD - phase_BD.floor()) - 1).abs().clamp(1e-6, 1 - 1e-6)
        normal_BD = math.sqrt(2) * torch.erfinv(2 * even_BD - 1)
        return (normal_BD * self.config.strength / unit_BD.shape[1] ** 0.5).to(unit_BD.dtype)


class Noise(_Secret):
    uses = ("strength", "key")
    keyed = True

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return unit_BD + self._noise(unit_BD)

    def expected(self, embedding_BD: Tensor) -> Tensor:
        return F.normalize(embedding_BD, dim=1)


class Adversarial(_Secret):
    uses = ("strength", "ascent", "decoder", "key")
    needs_features = True

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__(config, dim)
        with seeded(config.key, 0xADF):
            self.decoder = Generator(dim, config.decoder.size, config.decoder.width, 0).requires_grad_(False)

    def fit(self, plain_ND: Tensor, pictures_N3hw: Tensor | None = None) -> None:
        assert pictures_N3hw is not None
        recipe, decoder = self.config.decoder, self.decoder.requires_grad_(True)
        optimiser = torch.optim.AdamW(decoder.parameters(), recipe.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
        random = torch.Generator().manual_seed(seed_of(self.config.key))
        with torch.enable_grad():
            for _ in range(recipe.steps):
                rows = torch.randint(len(plain_ND), (recipe.batch,), generator=random)
                drawn_B3hw = decoder(plain_ND[rows])
                optimiser.zero_grad()
                (drawn_B3hw - to_float(pictures_N3hw[rows].to(drawn_B3hw.device))).abs().mean().backward()
                optimiser.step()
                schedule.step()
        decoder.requires_grad_(False)

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return F.normalize(unit_BD + self._away(unit_BD.detach()), dim=1)

    def _away(self, plain_BD: Tensor) -> Tensor:
        """What takes a feature, within the strength, to where the decoder draws something else than from it.

        Ascent by steps of a fixed length along each row's gradient (Madry et al., ICLR 2018).
        """
        drawn_B3hw, strength, steps = self.decoder(plain_BD), self.config.strength, self.config.ascent
        shift_BD = F.normalize(self._noise(plain_BD), dim=1) * strength / steps  # the gradient at the feature is 0
        with torch.enable_grad():
            for _ in range(steps):
                shift_BD = shift_BD.detach().requires_grad_(True)
                error = (self.decoder(plain_BD + shift_BD) - drawn_B3hw).square().flatten(1).mean(1).sum()
                (gradient_BD,) = torch.autograd.grad(error, shift_BD)
                shift_BD = shift_BD.detach() + 2.5 * strength / steps * F.normalize(gradient_BD, dim=1)
                shift_BD = shift_BD * (strength / shift_BD.norm(dim=1, keepdim=True)).clamp_max(1)
        return shift_BD.detach()


class Pca(Store):
    """ConfigError naming ``model.store.dim`` where more directions are asked for than there are."""

    uses = ("dim",)
    needs_features = True
    main_DA: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__(config, dim)
        _check_directions("dim", self.dim, dim)
        self.register_buffer("main_DA", torch.zeros(dim, self.dim))

    @property
    def reach(self) -> float:
        return 1.0  # the first component is a third of a feature and more, however many there are

    def fit(self, plain_ND: Tensor, pictures_N3hw: Tensor | None = None) -> None:
        self.main_DA.copy_(main_directions(plain_ND)[:, : self.dim])

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return F.normalize(unit_BD @ self.main_DA, dim=1)


class Rotation(_Secret):
    uses = ("key",)
    keyed = True

    def _draw(self) -> Tensor:
        # Evenly spread over all rotations and reflections, as Gaussian directions are.
        directions_DD, triangle_DD = torch.linalg.qr(super()._draw())
        return directions_DD * triangle_DD.diagonal().sign()  # which sign a library gives a column is its own affair

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return F.normalize(unit_BD @ self.secret_AS, dim=1)


class Signs(_Secret):
    uses = ("dim", "key")
    keyed = True
    one_bit = True

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return _signs(unit_BD @ self.secret_AS)


class Coded(_Secret):
    """Secret bits of the main directions. ConfigError naming ``model.store.axes`` where more are asked for than there
    are."""

    keyed = True
    one_bit = True
    main_DA: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        _check_directions("axes", config.axes, dim)
        super().__init__(config, dim)
        self.needs_features = config.axes > 0
        if config.axes:
            self.register_buffer("main_DA", torch.zeros(dim, config.axes))

    @property
    def axes(self) -> int:
        return self.config.axes or self.embedding_dim

    def fit(self, plain_ND: Tensor, pictures_N3hw: Tensor | None = None) -> None:
        if self.config.axes:
            self.main_DA.copy_(main_directions(plain_ND)[:, : self.config.axes])

    def coded(self, embedding_BD: Tensor) -> Tensor:
        """What is coded of an embedding, its main directions at unit norm, (B, A)."""
        return self._main(F.normalize(embedding_BD, dim=1))

    def _main(self, unit_BD: Tensor) -> Tensor:
        return F.normalize(unit_BD @ self.main_DA, dim=1) if self.config.axes else unit_BD

    def opened(self, stored_BS: Tensor, known_KA: Tensor) -> Tensor:
        """What whoever has the key finds behind bits, (B, A) at unit norm, knowing what is coded of other people;
        :meth:`coded` was the truth."""
        raise NotImplementedError


class Codes(Coded):
    uses = ("dim", "axes", "width", "spectrum", "key")
    phases_S: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__(config, dim)
        phases_S = (2 * math.pi * _drawn(config.key, "phases", self.dim)).float()
        self.register_buffer("phases_S", phases_S, persistent=False)

    def _draw(self) -> Tensor:
        waves = _drawn(self.config.key, "directions", self.axes, self.dim)
        secret_AS = torch.special.ndtri(waves)
        if self.config.spectrum == "shell":
            secret_AS = F.normalize(secret_AS, dim=0) * len(secret_AS) ** 0.5  # the mean of their squares stays
        return secret_AS

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return _signs(self._waves(self._main(unit_BD)))

    def _waves(self, coded_BA: Tensor) -> Tensor:
        return torch.cos(coded_BA @ self.secret_AS / self.config.width + self.phases_S)

    @torch.no_grad()
    def opened(self, stored_BS: Tensor, known_KA: Tensor, *, starts: int = 4, steps: int = 60) -> Tensor:
        """Where a code's signs agree best with the waves: sought from the best ``starts`` of what is ``known_KA`` of
        others and of as many random directions, by ascent. That takes a start within about twice the waves' width.
        """
        random = torch.Generator().manual_seed(seed_of(self.config.key))
        random_KA = torch.randn(known_KA.shape, generator=random)
        known_KA = F.normalize(torch.cat([known_KA, random_KA.to(known_KA)]), dim=1)
        waves_KS, found = self._waves(known_KA), []
        for signs_BS in stored_BS.sign().split(256):
            best_BT = (signs_BS @ waves_KS.mT).topk(min(starts, len(known_KA)), dim=1).indices
            place_BTA = known_KA[best_BT].requires_grad_()
            optimiser = torch.optim.Adam([place_BTA], self.config.width / 10)
            with torch.enable_grad():
                for step in range(steps):
                    optimiser.param_groups[0]["lr"] = self.config.width / 10 * (1 - step / steps)
                    optimiser.zero_grad()
                    agree_BT = self._agreement(signs_BS, place_BTA)
                    (-agree_BT.sum()).backward()
                    optimiser.step()
            first_B = self._agreement(signs_BS, place_BTA).argmax(1)
            found.append(F.normalize(place_BTA[torch.arange(len(first_B)), first_B], dim=1))
        return torch.cat(found)

    def _agreement(self, signs_BS: Tensor, place_BTA: Tensor) -> Tensor:
        return (self._waves(F.normalize(place_BTA, dim=2)) * signs_BS[:, None]).mean(2)


class Cells(Coded):
    """Features W walls from each other in every cell; a bit is a keyed hash (splitmix64, which is no cryptographic one)
    of between which walls a position lies. No gradient passes: a cell has none."""

    uses = ("dim", "axes", "width", "key")
    shifts_SW: Tensor
    factors_SW: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__(config, dim)
        shape = self.dim, self.walls
        self.register_buffer("shifts_SW", _drawn(config.key, "shifts", *shape).float(), persistent=False)
        self.register_buffer("factors_SW", _words(config.key, "factors", *shape) | 1, persistent=False)

    @property
    def walls(self) -> int:
        """Directions across which each cell has walls."""
        return min(self.axes, CELL_WALLS)

    def _draw(self) -> Tensor:
        normal = torch.special.ndtri(_drawn(self.config.key, "directions", self.axes, self.dim * self.walls))
        return F.normalize(normal, dim=0)

    def _kept(self, unit_BD: Tensor) -> Tensor:
        main_BA = self._main(unit_BD)
        bits_BS = torch.cat([self._bits(some) for some in main_BA.detach().split(256)])
        return _straight_through(bits_BS / self.dim**0.5, 0 * main_BA.sum(1, keepdim=True).expand_as(bits_BS))

    def _bits(self, main_BA: Tensor) -> Tensor:
        """(B, S), ±1."""
        across_BSW = (main_BA @ self.secret_AS / self.config.width).unflatten(1, self.shifts_SW.shape)
        cells_BSW = (across_BSW + self.shifts_SW).floor().long()
        return 2.0 * (_mixed((cells_BSW * self.factors_SW).sum(2)) >> 40 & 1) - 1

    @torch.no_grad()
    def opened(self, stored_BS: Tensor, known_KA: Tensor, *, tried: int = 50_000, steps: int = 40) -> Tensor:
        """Where a feature's bits agree best: sought from what is known of others, from between two of them, and then
        in ever smaller steps at random, since cells have no slope."""
        random = torch.Generator().manual_seed(seed_of(self.config.key))
        one, other = torch.randint(len(known_KA), (2, tried), generator=random).to(known_KA.device)
        share = torch.rand(tried, 1, generator=random).to(known_KA)
        known_KA = torch.cat([known_KA, share * known_KA[one] + (1 - share) * known_KA[other]])
        known_KA, found = F.normalize(known_KA, dim=1), []
        known_KS = torch.cat([self._bits(some).to(torch.int8) for some in known_KA.split(256)])
        for signs_BS in stored_BS.sign().split(64):
            agree_KB = torch.cat([some.float() @ signs_BS.mT for some in known_KS.split(4096)])
            best_TB = agree_KB.topk(4, dim=0).indices
            place_BTA = known_KA[best_TB.mT]
            for step in range(steps):
                moved_BTMA = place_BTA[:, :, None] + self._moves(place_BTA, 0.3 * 0.9**step, random)
                moved_BTMA = F.normalize(torch.cat([place_BTA[:, :, None], moved_BTMA], 2), dim=3)
                agree_BTM = self._agreement(signs_BS, moved_BTMA)
                best_BT1A = agree_BTM.argmax(2)[:, :, None, None].expand(*place_BTA.shape[:2], 1, place_BTA.shape[2])
                place_BTA = moved_BTMA.gather(2, best_BT1A)[:, :, 0]
            first_B = self._agreement(signs_BS, place_BTA[:, :, None])[:, :, 0].argmax(1)
            found.append(place_BTA[torch.arange(len(first_B)), first_B])
        return torch.cat(found)

    def _moves(self, place_BTA: Tensor, far: float, random: torch.Generator) -> Tensor:
        shape = *place_BTA.shape[:2], 16, place_BTA.shape[2]
        return torch.randn(shape, generator=random).to(place_BTA) * far / shape[-1] ** 0.5

    def _agreement(self, signs_BS: Tensor, place_BTMA: Tensor) -> Tensor:
        bits_XS = torch.cat([self._bits(some) for some in place_BTMA.flatten(0, 2).split(256)])
        return (bits_XS.unflatten(0, place_BTMA.shape[:3]) * signs_BS[:, None, None]).mean(3)


KINDS: dict[str, type[Store]] = {
    "plain": Store,
    "noise": Noise,
    "adversarial": Adversarial,
    "pca": Pca,
    "rotation": Rotation,
    "signs": Signs,
    "codes": Codes,
    "cells": Cells,
}


def make_store(config: StoreConfig, dim: int) -> Store:
    """What keeps embeddings of ``dim`` numbers as ``config`` says, on the CPU. ConfigError naming the setting that
    suits no such embedding."""
    return KINDS[config.kind](config, dim)


def main_directions(plain_ND: Tensor) -> Tensor:
    """(D, D) float64, a column each, the main one first: of the second moment, since a gallery compares features
    without centring. Each one's largest component is positive: which sign a library gives it is its own affair."""
    moment_DD = plain_ND.double().mT @ plain_ND.double()
    directions_DD = torch.linalg.eigh(moment_DD)[1].flip(1)
    largest_1D = directions_DD.abs().argmax(0, keepdim=True)
    return directions_DD * directions_DD.gather(0, largest_1D).sign()


def _check_directions(setting: str, asked: int, dim: int) -> None:
    if asked > dim:
        raise ConfigError(f"model.store.{setting}: {asked} is more than the embedding's {dim}")


def _signs(smooth_BS: Tensor) -> Tensor:
    """At unit norm. 0 has a sign too: a bit that was left out would tell."""
    signs_BS = torch.where(smooth_BS.detach() < 0, -1.0, 1.0) / smooth_BS.shape[1] ** 0.5
    return _straight_through(signs_BS, F.normalize(smooth_BS, dim=1))


def _drawn(key: int, what: str, *shape: int) -> Tensor:
    """The secret ``what`` of a key: numbers spread evenly within (0, 1), float64, the same on every platform.

    From a hash, since torch's generator on the CPU keeps 32 bits of its seed, and so few keys can all be tried.
    """
    label = f"ppreid_dist model.store {what} {key}"
    words = np.frombuffer(hashlib.shake_256(label.encode()).digest(4 * math.prod(shape)), dtype="<u4")
    return torch.from_numpy((words + 0.5) * 2.0**-32).reshape(shape)


def _words(key: int, what: str, *shape: int) -> Tensor:
    """The same as int64, evenly spread."""
    label = f"ppreid_dist model.store {what} {key}"
    words = np.frombuffer(hashlib.shake_256(label.encode()).digest(8 * math.prod(shape)), dtype="<i8")
    return torch.from_numpy(words.astype(np.int64)).reshape(shape)


def _mixed(word: Tensor) -> Tensor:
    """splitmix64's finaliser, of int64 (Steele, Lea & Flood, OOPSLA 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        word = (word ^ (word >> shift & (1 << 64 - shift) - 1)) * factor
    return word


def int8_reach(dim: int) -> float:
    """How far 127 levels reach for unit vectors of ``dim`` components that are about equally large.

    A component's root mean square is 1/√D, so to four times that (or to 1, if that is less): the obvious range, 1,
    would leave a 2048-dimensional feature three levels on either side.
    """
    return min(1.0, INT8_SIGMAS / dim**0.5)


def quantise_int8(stored_BS: Tensor, reach: float) -> Tensor:
    """Round unit vectors (B, S) to 255 levels between ``reach`` and its negative, beyond which they are cut; the
    gradient passes straight through (Bengio et al., 2013)."""
    step = reach / INT8_MAX
    return _straight_through((stored_BS.detach() / step).round().clamp(-INT8_MAX, INT8_MAX) * step, stored_BS)


def _straight_through(rounded_BS: Tensor, smooth_BS: Tensor) -> Tensor:
    # This way round the values are the rounded ones exactly: nothing of the others is left in the last bits.
    return rounded_BS + (smooth_BS - smooth_BS.detach())
