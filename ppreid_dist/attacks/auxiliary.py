"""What else an attacker may know than what the gallery stores of other people of the same domain.

``other_domain``: people of another data set, with other cameras. A lower bound of a kind: who has no pictures of this
domain. ``same_people``: the gallery's pictures of the very people whose query pictures are reconstructed, never a
query picture itself. An upper bound: whoever has pictures of the enrolled people needs matching alone, and features
that still match people give it to him; its r says how far the features still match, and is near 1 where they do.
``extractor``: the attackers' own people again, as the extractor sees them, by somebody who has it, and not the key, and
has enrolled few of them (``attacks.enrolled``). Only where a key hides what is stored: without one he makes himself
what the gallery would store of his people, which is what the axes measure.

**How ``same_people`` chooses its capacity.** Attackers hold out people, as it is strangers whom they will be tested
on. Here they are tested on new pictures of people they know: held out by people, they would choose to draw what is
common to all, and the upper bound would be none. So here, and only here, pictures are held out, whoever they show,
which is what the test asks; and the floor's pairs are permuted by picture, as pairs permuted by person would be learnt.

Shapes: N auxiliary pictures, G gallery pictures, D feature dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import Settings, option

VARIANTS = ("other_domain", "same_people", "extractor")


@dataclass(kw_only=True)
class AuxiliaryConfig(Settings):
    variants: list[str] = option(
        [],
        "who else attacks: who learns on people of another data set, or on the gallery's pictures of the tested "
        "people, or who has the extractor, and few people under the key",
        choices=VARIANTS,
    )
    data: str = option(
        "", "other_domain's data set: a configuration whose `data` is read; its aux people, or its train"
    )
    enrolled: list[int] = option(
        [2], "of extractor: how many of the attackers' people are enrolled under the key", at_least=1
    )
    attackers: list[str] = option(["ridge"], "who learns on it: any attacker but adaptive")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "other_domain" in self.variants and not self.data:
            raise ConfigError("data: other_domain needs a configuration file that names another data set")
        if "adaptive" in self.attackers:
            raise ConfigError("attackers: adaptive has no counterpart on the control and can't be compared here")


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """What attackers of a ``variant`` learn on: pictures of the attackers' size, and what each victim, by its role
    "control" or "protected", stores of them, or what they know of them instead. ``stolen_LD`` is, where they read a
    victim's database otherwise than it is stored, what they read, the queries' first."""

    variant: str
    pictures: Pictures
    features_ND: Mapping[str, Tensor]
    stolen_LD: Mapping[str, Tensor] = field(default_factory=dict)


def same_people(gallery: Pictures, query: Pictures, features_GD: Mapping[str, Tensor]) -> Auxiliary:
    """Of the gallery, both in the attackers' size, the pictures of the query's people that are no query picture."""
    asked = {picture.tobytes() for picture in query.images_N3HW.cpu().numpy()}
    copied_G = np.array([picture.tobytes() in asked for picture in gallery.images_N3HW.cpu().numpy()])
    rows = np.flatnonzero(np.isin(gallery.pids_N, query.pids_N) & ~copied_G)
    features_ND = {role: of_GD[rows] for role, of_GD in features_GD.items()}
    return Auxiliary(variant="same_people", pictures=gallery.only(rows), features_ND=features_ND)
