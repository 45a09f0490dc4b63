"""What all kinds of stores have in common, and the plain one.

Shapes: B batch, N fitted rows, D the embedding's dim, S the stored dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import Settings, option

PUBLIC_KEY = 0  # for measurements; a gallery takes its own
INT8_MAX = 127
INT8_SIGMAS = 4.0


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


def check_directions(setting: str, asked: int, dim: int) -> None:
    if asked > dim:
        raise ConfigError(f"model.store.{setting}: {asked} is more than the embedding's {dim}")


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
    return straight_through((stored_BS.detach() / step).round().clamp(-INT8_MAX, INT8_MAX) * step, stored_BS)


def straight_through(rounded_BS: Tensor, smooth_BS: Tensor) -> Tensor:
    # This way round the values are the rounded ones exactly: nothing of the others is left in the last bits.
    return rounded_BS + (smooth_BS - smooth_BS.detach())


def signs(smooth_BS: Tensor) -> Tensor:
    """At unit norm. 0 has a sign too: a bit that was left out would tell."""
    signs_BS = torch.where(smooth_BS.detach() < 0, -1.0, 1.0) / smooth_BS.shape[1] ** 0.5
    return straight_through(signs_BS, F.normalize(smooth_BS, dim=1))
