"""Linkage: can two leaked databases that keep the same people otherwise be joined, person by person?

One is the protected gallery. The other is the same gallery under another key, or, where what it stores has none, after
a secret rotation (which costs no accuracy and is advertised as making templates renewable); or the control's, an
extractor trained apart. Who has both compares entries as they are, or learns from people whom he enrolled in both
himself how one reads in the other's terms. Entries of the same picture and of the same camera are not compared.

Shapes: N auxiliary pictures, Q query pictures, D feature dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.attacks.base import split_people
from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.unlinkability import linkage
from ppreid_dist.kernels import kernel_ridge
from ppreid_dist.settings import Settings, option

_KEY = 0x1EE7  # of the other key


@dataclass(kw_only=True)
class LinkageConfig(Settings):
    widths: list[float] = option(
        [kernel_ridge.LINEAR, 1.0, 2.0], "kernel widths of the learnt map to try; 0 is a linear map", at_least=0
    )
    ridges: list[float] = option([1e-5, 1e-4, 1e-3, 1e-2, 1e-1], "its ridges to try, per picture", more_than=0)
    pictures: int = option(2000, "at most this many auxiliary pictures are learnt from", at_least=16)
    draws: int = option(200, "permutations of the people behind the value that chance reaches", at_least=20)


class Stored(NamedTuple):
    """What a database keeps of the auxiliary and of the query pictures, and its other entries, where they are known."""

    aux_ND: Tensor
    query_QD: Tensor
    leaked_LD: Tensor | None = None


def rotated(stored: Stored) -> Stored:
    """Both after one secret rotation."""
    dim = stored.aux_ND.shape[1]
    turned_DD = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(_KEY))
    turn_DD = torch.linalg.qr(turned_DD)[0].to(stored.aux_ND)
    return Stored(stored.aux_ND @ turn_DD, stored.query_QD @ turn_DD)


def learnt_map(
    known: Tensor, wanted: Tensor, pids_N: np.ndarray, config: LinkageConfig, *, seed: int
) -> kernel_ridge.KernelRidge:
    """From one database's terms into the other's, by the width and ridge that held-out people choose."""
    some = np.random.default_rng([seed, 0x11F]).permutation(len(pids_N))[: config.pictures]
    rows = [torch.from_numpy(some[part]) for part in split_people(pids_N[some], seed)]
    (known_F, known_H), (wanted_F, wanted_H) = ([of[part] for part in rows] for of in (known, wanted))
    width, ridge, _ = kernel_ridge.choose(known_F, wanted_F, known_H, wanted_H, config.widths, config.ridges)
    every = torch.from_numpy(some)
    return kernel_ridge.fit(known[every], wanted[every], width=width, ridge=ridge)


def linkage_of(
    aux: Pictures,
    query: Pictures,
    stored: Mapping[str, Stored],
    rekeyed: Stored | None,
    config: LinkageConfig,
    *,
    seed: int,
    coded: Callable[[Stored], Stored | None] = lambda stored: None,
) -> list[dict[str, Any]] | None:
    """A row for each way to join two databases, JSON-ready; ``stored`` has "control" and "protected", ``rekeyed`` the
    protected one's under another key, if there is one. ``coded`` finds what was coded in a database, where it keeps
    codes: maps between these numbers are learnt beside those between the codes.

    None where no query person is seen by two cameras.
    """
    usable_QQ = query.camids_N[:, None] != query.camids_N[None, :]
    others = {
        "the same gallery": stored["protected"],
        **({"another key": rekeyed} if rekeyed else {"a rotation of it": rotated(stored["protected"])}),
        "another extractor (the control)": stored["control"],
    }
    own = stored["protected"]
    joins = [(name, False, own, other) for name, other in others.items()]
    joins += [(name, True, own, other) for name, other in list(others.items())[1:]]
    if (opened := coded(own)) is not None:
        joins += [
            (f"{name}, what was coded", True, opened, coded(other) or other) for name, other in list(others.items())[1:]
        ]
    rows = []
    for name, learnt, one, other in joins:
        here, there = one.query_QD, other.query_QD
        if learnt:
            here = learnt_map(one.aux_ND, other.aux_ND, aux.pids_N, config, seed=seed).predict(here)
        elif here.shape[1] != there.shape[1]:
            continue  # they can't be compared as they are
        similarity_QQ = F.normalize(here.double(), dim=1) @ F.normalize(there.double(), dim=1).mT
        found = linkage(
            similarity_QQ.cpu().numpy(), query.pids_N, query.pids_N, usable_QQ, draws=config.draws, seed=seed
        )
        if found is None:
            return None
        rows.append({"other": name, "learnt": learnt, **asdict(found)})
    return rows
