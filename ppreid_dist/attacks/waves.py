"""The waves behind codes, found without their key, and by them where each code lies.

A bit of a code says on which half of a secret wave a position is (``model.store.kind=codes``). Whoever knows the scheme
lacks the positions and the waves, and can have both: positions that explain how alike the codes are
(``attacks.unfolded``) are near enough to the truth to tell which of many drawn waves agrees with a bit over all entries
of a database. Waves and positions then make each other sharper, by ascent of how much both agree (as in bundle
adjustment, Triggs et al., 1999). Positions that agree badly with their bits are sought anew from where others lie. No
key is needed, and no picture; with the waves every further code is opened like those of the database
(``Store.opened`` does the same with the key).

Shapes: L features of the pool, M features to place, S bits, K dimensions of a position, C candidates, T starts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ppreid_dist.settings import Settings, option
from ppreid_dist.transfer import to_device

AT_ONCE = 2000  # compared at once
BATCH = 512
ENOUGH = 0.6  # mean agreement from which on nothing is left to gain: signs of waves and waves themselves have 2 / π


@dataclass(kw_only=True)
class WavesConfig(Settings):
    candidates: int = option(
        20_000, "waves that are tried for each bit, where features are bits; 0: theirs aren't sought", at_least=0
    )
    bits: int = option(4096, "bits at most whose waves are sought", at_least=1)
    rounds: int = option(4, "times that waves are sought and improved with the positions, at most", at_least=1)
    steps: int = option(300, "steps of ascent of both in each", at_least=1)


def are_bits(features_MD: Tensor) -> bool:
    """Whether each number of the features is one of two of opposite signs."""
    sizes_MD = features_MD.abs()
    return bool(sizes_MD.amin() > 0.999 * sizes_MD.amax())


class Waves:
    """What is found of them. ``places_LK`` are the pool's positions, ``agreement`` the mean of bits times waves."""

    def __init__(self, bits_LS: Tensor, places_LK: Tensor, *, rate: float, config: WavesConfig, seed: int):
        """``bits_LS`` are ±1; ``rate`` is that at which their likeness falls with the square of a distance, which says
        how long the waves are."""
        device = places_LK.device
        random = torch.Generator().manual_seed(seed)
        some_S = torch.randperm(bits_LS.shape[1], generator=random)[: config.bits]
        self.chosen_S = to_device(some_S, device)
        bits_LS = bits_LS[:, self.chosen_S]
        places_LK = (places_LK - places_LK.mean(0)).clone()
        self.mean_length = (2 * rate) ** 0.5  # the deviation of a wave's numbers, per unit of distance
        self.scale = float(places_LK.square().mean().sqrt())
        self.directions_KS = places_LK.new_zeros(places_LK.shape[1], len(some_S))
        self.phases_S = places_LK.new_zeros(len(some_S))
        self.places_LK, self.agreement = places_LK, 0.0
        for _ in range(config.rounds):
            self._search(bits_LS, config.candidates, random)
            self._ascend(bits_LS, config.steps, random, with_places=False)
            self._ascend(bits_LS, config.steps, random, with_places=True)
            self._move(bits_LS)
            before, self.agreement = self.agreement, float(self._agree(self.places_LK, bits_LS).mean())
            if self.agreement > ENOUGH or self.agreement < before + 0.01:
                break

    def __call__(self, bits_MD: Tensor, start_MK: Tensor) -> Tensor:
        """(M, K): where codes lie that aren't in the pool, sought from ``start_MK`` and from where the pool's best
        lie."""
        return self._sought(bits_MD[:, self.chosen_S], start_MK)

    def _waves(self, places_MK: Tensor) -> Tensor:
        return torch.cos(places_MK @ self.directions_KS + self.phases_S)

    def _agree(self, places_MK: Tensor, bits_MS: Tensor) -> Tensor:
        """(S,), over all rows."""
        parts = zip(places_MK.split(1024), bits_MS.split(1024), strict=True)
        return torch.stack([(self._waves(places) * bits).sum(0) for places, bits in parts]).sum(0) / len(places_MK)

    def _search(self, bits_LS: Tensor, count: int, random: torch.Generator) -> None:
        """In place of a bit's wave, the one of ``count`` drawn ones that agrees better with it, if one does."""
        best_S = self._agree(self.places_LK, bits_LS).clamp_min(0)
        for first in range(0, count, AT_ONCE):
            drawn_KC = torch.randn(len(self.directions_KS), min(AT_ONCE, count - first), generator=random)
            drawn_KC = to_device(drawn_KC, bits_LS.device) * self.mean_length
            real_CS, imaginary_CS = (bits_LS.new_zeros(drawn_KC.shape[1], bits_LS.shape[1]) for _ in range(2))
            for places, bits in zip(self.places_LK.split(2048), bits_LS.split(2048), strict=True):
                phases_LC = places @ drawn_KC
                real_CS += phases_LC.cos().T @ bits
                imaginary_CS += phases_LC.sin().T @ bits
            found_S, which_S = (torch.hypot(real_CS, imaginary_CS) / len(bits_LS)).max(0)
            better = torch.nonzero(found_S > best_S).flatten()
            which = which_S[better]
            self.directions_KS[:, better] = drawn_KC[:, which]
            self.phases_S[better] = torch.atan2(-imaginary_CS[which, better], real_CS[which, better])
            best_S[better] = found_S[better]

    def _ascend(self, bits_LS: Tensor, steps: int, random: torch.Generator, *, with_places: bool) -> None:
        """Of the waves alone, or of positions too; then bits count by the square of how well they agree, so that
        waves that aren't found move nobody."""
        waves_lr, places_lr = (0.02, 0.03) if with_places else (0.05, 0.0)
        moved = [(self.directions_KS, waves_lr * self.mean_length), (self.phases_S, waves_lr)]
        if with_places:
            moved.append((self.places_LK, places_lr * self.scale))
        optimiser = torch.optim.Adam([{"params": [of.requires_grad_()], "lr": lr} for of, lr in moved])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        for _ in range(steps):
            rows = torch.randperm(len(bits_LS), generator=random)[:BATCH].sort().values
            rows_B = to_device(rows, bits_LS.device)
            with torch.enable_grad():
                agree_S = (self._waves(self.places_LK[rows_B]) * bits_LS[rows_B]).mean(0)
                optimiser.zero_grad()
                (-(agree_S.clamp_min(0).square() if with_places else agree_S).mean()).backward()
            optimiser.step()
            schedule.step()
        for of, _ in moved:
            of.requires_grad_(False)

    def _move(self, bits_LS: Tensor) -> None:
        """Who agrees better with a position that is sought from others' goes there."""
        self.weight_S = self._agree(self.places_LK, bits_LS).clamp_min(0)
        self.places_LK = self._sought(bits_LS, self.places_LK)

    def _fit(self, places_MTK: Tensor, bits_MS: Tensor) -> Tensor:
        """(M, T): how well positions agree with bits, surer waves counting more."""
        return (self._waves(places_MTK) @ (bits_MS * self.weight_S)[:, :, None])[..., 0]

    def _sought(self, bits_MS: Tensor, start_MK: Tensor, starts: int = 3, steps: int = 40) -> Tensor:
        """By ascent from ``start_MK`` and from where the pool's best lie; the best end, or ``start_MK`` itself."""
        waves_LS, found = self._waves(self.places_LK) * self.weight_S, []
        for bits_BS, start_BK in zip(bits_MS.split(256), start_MK.split(256), strict=True):
            best_BT = (bits_BS @ waves_LS.T).topk(min(starts, len(waves_LS)), dim=1).indices
            first_BTK = torch.cat([start_BK[:, None], self.places_LK[best_BT]], 1)
            place_BTK = first_BTK.clone().requires_grad_()
            optimiser = torch.optim.Adam([place_BTK], 0.1 * self.scale)
            for step in range(steps):
                optimiser.param_groups[0]["lr"] = 0.1 * self.scale * (1 - step / steps)
                with torch.enable_grad():
                    optimiser.zero_grad()
                    (-self._fit(place_BTK, bits_BS).sum()).backward()
                optimiser.step()
            place_BTK = torch.cat([start_BK[:, None], place_BTK.detach()], 1)
            best_B = self._fit(place_BTK, bits_BS).argmax(1)
            found.append(place_BTK[torch.arange(len(best_B)), best_B])
        return torch.cat(found)
