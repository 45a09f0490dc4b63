"""Codes and cells: secret bits of the main directions.

Shapes: B batch, N fitted rows, K known embeddings, D the embedding's dim, A main directions, S the stored dim,
W directions of walls.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.errors import ConfigError
from ppreid_dist.models.seeding import seed_of
from ppreid_dist.models.stores.base import StoreConfig, check_directions, signs, straight_through
from ppreid_dist.models.stores.projected import main_directions
from ppreid_dist.models.stores.secret import Secret, drawn, drawn_words, siphash

CELL_WALLS = 16  # directions of walls at most; with fewer a cell would be a slab, of which many are seen
NARROWEST = 1 / 100  # of cells: the walls that a vector at unit norm can cross then are counted in a byte


class Coded(Secret):
    """Secret bits of the main directions. ConfigError naming ``model.store.axes`` where more are asked for than there
    are."""

    keyed = True
    one_bit = True
    main_DA: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        check_directions("axes", config.axes, dim)
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
        phases_S = (2 * math.pi * drawn(config.key, "phases", self.dim)).float()
        self.register_buffer("phases_S", phases_S, persistent=False)

    def _draw(self) -> Tensor:
        waves = drawn(self.config.key, "directions", self.axes, self.dim)
        secret_AS = torch.special.ndtri(waves)
        if self.config.spectrum == "shell":
            secret_AS = F.normalize(secret_AS, dim=0) * len(secret_AS) ** 0.5  # the mean of their squares stays
        return secret_AS

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return signs(self._waves(self._main(unit_BD)))

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
    """A bit is a keyed hash of its own number and of between which walls, in each of W directions, a position lies.
    No gradient passes: a cell has none. ConfigError naming ``model.store.width`` where more walls would be crossed
    than a hash tells apart."""

    uses = ("dim", "axes", "width", "key")
    shifts_SW: Tensor
    hash_key_2: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        if config.width < NARROWEST:
            raise ConfigError(f"model.store.width: of cells {NARROWEST} or more, not {config.width}")
        super().__init__(config, dim)
        shape = self.dim, self.walls
        self.register_buffer("shifts_SW", drawn(config.key, "shifts", *shape).float(), persistent=False)
        self.register_buffer("hash_key_2", drawn_words(config.key, "hash", 2), persistent=False)

    @property
    def walls(self) -> int:
        """Directions across which each cell has walls."""
        return min(self.axes, CELL_WALLS)

    def _draw(self) -> Tensor:
        normal = torch.special.ndtri(drawn(self.config.key, "directions", self.axes, self.dim * self.walls))
        return F.normalize(normal, dim=0)

    def _kept(self, unit_BD: Tensor) -> Tensor:
        main_BA = self._main(unit_BD)
        bits_BS = torch.cat([self._bits(some) for some in main_BA.detach().split(256)])
        return straight_through(bits_BS / self.dim**0.5, 0 * main_BA.sum(1, keepdim=True).expand_as(bits_BS))

    def _bits(self, main_BA: Tensor) -> Tensor:
        """(B, S), ±1."""
        across_BSW = (main_BA @ self.secret_AS / self.config.width).unflatten(1, self.shifts_SW.shape)
        cells_BSW = (across_BSW + self.shifts_SW).floor().to(torch.int8)
        words_BSX = F.pad(cells_BSW, (0, -self.walls % 8)).view(torch.int64)  # eight cells a word
        number_S = torch.arange(self.dim, device=main_BA.device).expand(words_BSX.shape[:2])
        return 2.0 * (siphash(self.hash_key_2, [number_S, *words_BSX.unbind(2)]) & 1) - 1

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
