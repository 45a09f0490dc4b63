"""The waves behind codes, found without their key, and by them where each code lies.

A bit of a code says on which half of a secret wave a position is (``model.store.kind=codes``). Whoever knows the scheme
lacks the positions and the waves, and can have both: positions that explain how alike the codes are
(``attacks.unfolded``) are near enough to the truth to tell which of many drawn waves agrees with a bit over all entries
of a database. Where codes are so narrow that no chain of near entries joins people, no such positions are found; then
what his own ReID model sees of his own people are positions, and bits in which near entries differ tell along which
line a wave runs (:class:`FlippedWaves`). Waves and positions then make each other sharper, by ascent of how much both
agree (as in bundle adjustment, Triggs et al., 1999). Positions that agree badly with their bits are sought anew from
where others lie. No key is needed, and no picture; with the waves every further code is opened like those of the
database (``Store.opened`` does the same with the key).

Shapes: L features of the pool, A of them whose positions are roughly known, M features to place, S bits, K dimensions
of a position, C candidates, T starts, P pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ppreid_dist.settings import Settings, option
from ppreid_dist.transfer import to_device

AT_ONCE = 2000  # compared at once
BATCH = 512
NEAR = 0.15  # mean product of bits from which on a pair is near: about two widths
PAIRS = 50_000  # near ones at most, by which lines are found
TURNS = torch.linspace(0.3, 12.0, 80)  # deviations of a wave's phases that are tried
MIXED = 20_000  # places between two known ones where others are sought
SOME = 0.4  # mean agreement from which on they are taken for waves: hashes of cells look like some, too
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

    places_LK: Tensor
    agreement: float

    def __init__(self, bits_LS: Tensor, places_LK: Tensor, *, rate: float, config: WavesConfig, seed: int):
        """``bits_LS`` are ±1; ``rate`` is that at which their likeness falls with the square of a distance, which says
        how long the waves are."""
        random = torch.Generator().manual_seed(seed)
        bits_LS = self._begin(bits_LS, places_LK, config, random)
        self.mean_length = (2 * rate) ** 0.5  # the deviation of a wave's numbers, per unit of distance
        for _ in range(config.rounds):
            self._search(bits_LS, config.candidates, random)
            self._ascend(bits_LS, config.steps, random, with_places=False)
            self._ascend(bits_LS, config.steps, random, with_places=True)
            self._move(bits_LS)
            before, self.agreement = self.agreement, float(self._agree(self.places_LK, bits_LS).mean())
            if self.agreement > ENOUGH or self.agreement < before + 0.01:
                break

    def _begin(self, bits_LS: Tensor, places_LK: Tensor, config: WavesConfig, random: torch.Generator) -> Tensor:
        """The bits whose waves are sought."""
        some_S = torch.randperm(bits_LS.shape[1], generator=random)[: config.bits]
        self.chosen_S = to_device(some_S, places_LK.device)
        self.places_LK, self.agreement = (places_LK - places_LK.mean(0)).clone(), 0.0
        self.scale = float(self.places_LK.square().mean().sqrt())
        self.directions_KS = places_LK.new_zeros(places_LK.shape[1], len(some_S))
        self.phases_S = places_LK.new_zeros(len(some_S))
        return bits_LS[:, self.chosen_S]

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


class FlippedWaves(Waves):
    """The same where positions are roughly known of some features only, in terms of their own, and how alike codes are
    says nothing of the rest.

    Of two near features the bits differ whose waves run along the line between them: over many near pairs, the line
    along which bits differ most is the wave's. How long it is and where it begins is then one number each. Others lie
    where the waves say, sought from the known positions and from between them.
    """

    def __init__(self, bits_LS: Tensor, rows_A: Tensor, places_AK: Tensor, *, config: WavesConfig, seed: int):
        random = torch.Generator().manual_seed(seed)
        known_AS = self._begin(bits_LS[rows_A], places_AK.float(), config, random)
        bits_LS = bits_LS[:, self.chosen_S]
        self._follow(known_AS, random)
        self._ascend(known_AS, config.steps, random, with_places=False)
        self._ascend(known_AS, config.steps, random, with_places=True)
        self.weight_S = self._agree(self.places_LK, known_AS).clamp_min(0)
        places_LK = self._between(bits_LS, random)
        places_LK[rows_A] = self.places_LK
        self.places_LK = places_LK
        for _ in range(config.rounds):
            self._ascend(bits_LS, config.steps, random, with_places=True)
            self._move(bits_LS)
        self.agreement = float(self._agree(self.places_LK, bits_LS).mean())

    def _follow(self, bits_AS: Tensor, random: torch.Generator) -> None:
        """A wave for each bit, by the pairs in which it differs."""
        one_P, other_P = _near_pairs(bits_AS, random)
        apart_PK = self.places_LK[one_P] - self.places_LK[other_P]
        moment_KK = apart_PK.mT @ apart_PK / max(1, len(apart_PK))
        ridge_KK = (1e-6 * moment_KK.trace() + 1e-12) * torch.eye(len(moment_KK), device=moment_KK.device)
        white_KK = torch.linalg.inv(torch.linalg.cholesky(moment_KK + ridge_KK))
        line_PK = apart_PK @ white_KK.mT
        count, sums_SKK = len(line_PK), bits_AS.new_zeros(bits_AS.shape[1], line_PK.shape[1] ** 2)
        for start in range(0, count, AT_ONCE):
            some = slice(start, start + AT_ONCE)
            differ_PS = (bits_AS[one_P[some]] != bits_AS[other_P[some]]).float()
            differ_PS -= differ_PS.mean(0)
            sums_SKK += differ_PS.mT @ (line_PK[some, :, None] * line_PK[some, None]).flatten(1)
        lines_SK = torch.linalg.eigh(sums_SKK.unflatten(1, white_KK.shape))[1][:, :, -1] @ white_KK
        along_AS = self.places_LK @ lines_SK.mT
        lines_SK, along_AS = lines_SK / along_AS.std(0)[:, None], along_AS / along_AS.std(0)
        best_S = bits_AS.new_zeros(bits_AS.shape[1])
        for turn in TURNS.tolist():
            real_S, imaginary_S = (of(along_AS * turn).mul(bits_AS).mean(0) for of in (torch.cos, torch.sin))
            found_S = torch.hypot(real_S, imaginary_S)
            better_S = found_S > best_S
            self.directions_KS[:, better_S] = turn * lines_SK[better_S].mT
            self.phases_S[better_S] = torch.atan2(-imaginary_S, real_S)[better_S]
            best_S = torch.maximum(best_S, found_S)
        self.mean_length = float(self.directions_KS.square().mean().sqrt())

    def _between(self, bits_LS: Tensor, random: torch.Generator) -> Tensor:
        """(L, K): of the known positions and those between two, from where each feature's is sought."""
        known_AK = self.places_LK
        one, other = (
            to_device(torch.randint(len(known_AK), (MIXED,), generator=random), known_AK.device) for _ in "ab"
        )
        share = to_device(torch.rand(MIXED, 1, generator=random), known_AK.device)
        self.places_LK = torch.cat([known_AK, share * known_AK[one] + (1 - share) * known_AK[other]])
        waves_XS = self._waves(self.places_LK) * self.weight_S
        start_LK = torch.cat([self.places_LK[(some @ waves_XS.mT).argmax(1)] for some in bits_LS.split(512)])
        found_LK = self._sought(bits_LS, start_LK)
        self.places_LK = known_AK
        return found_LK


def _near_pairs(bits_AS: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of pairs of near features, (P,) each, at most PAIRS drawn ones."""
    found = []
    for start in range(0, len(bits_AS), AT_ONCE):
        alike = bits_AS[start : start + AT_ONCE] @ bits_AS.mT / bits_AS.shape[1]
        one_P, other_P = torch.nonzero(alike > NEAR, as_tuple=True)
        one_P = one_P + start
        pairs_2P = torch.stack([one_P, other_P])[:, one_P < other_P]
        # Of a part no more than are kept of all: wide codes have billions.
        found.append(_some(pairs_2P, random) if pairs_2P.shape[1] > PAIRS else pairs_2P)
    one_P, other_P = _some(torch.cat(found, 1), random)
    return one_P, other_P


def _some(pairs_2P: Tensor, random: torch.Generator) -> Tensor:
    some_P = torch.randperm(pairs_2P.shape[1], generator=random)[:PAIRS]
    return pairs_2P[:, to_device(some_P, pairs_2P.device)]
