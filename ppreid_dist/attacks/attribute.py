"""The attribute probe: what a stored feature tells about clothes, hair or build, without any picture being drawn.

A kernel ridge classifier for each attribute learns from the attackers' own people and is asked about people it never
saw. What counts is the balanced accuracy, the mean over the attribute's values of the share of pictures with that value
for which it is named. The ceiling is the same probe on the control's features. The floor is chance: whoever names
values without looking is right for 1 / values of them, however common each is and however often it is named. That is
exact; a probe retrained on the labels of other people comes out there too, but with the noise of one draw of people.

Shapes: N auxiliary pictures, H held out of them, Q query pictures, D feature dim, C values of one attribute, V values
of all attributes, B the statistic itself, then each resample.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.base import VIEWS, Progress, fit_view, split_people
from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.leak import compare
from ppreid_dist.kernels import kernel_ridge
from ppreid_dist.settings import Settings, option

Labels = dict[str, np.ndarray]  # attribute → the number of each picture's value, −1 where it is not known


@dataclass(kw_only=True)
class AttributeConfig(Settings):
    widths: list[float] = option(
        [1.0, 2.0, kernel_ridge.LINEAR],
        "kernel widths to try, in root mean squared distances; 0 is the linear kernel",
        at_least=0,
    )
    ridges: list[float] = option([1e-4, 1e-3, 1e-2, 1e-1, 1.0], "ridges to try, per picture", more_than=0)
    people: int = option(8, "auxiliary people that a value needs; rarer values are not asked for", at_least=2)
    pictures: int = option(2000, "at most this many auxiliary pictures are learnt from", at_least=16)


def common_values(attributes: Mapping[str, list[str]], pids_N: np.ndarray, people: int) -> dict[str, list[str]]:
    """The values of each attribute that at least so many people have, where there are two or more of them.

    An empty value is an unknown one. A column of numbers or free text has no such values, and isn't asked for.
    """
    found = {}
    for name, column in attributes.items():
        owners: dict[str, set[int]] = {}
        for value, pid in zip(column, pids_N.tolist(), strict=True):
            owners.setdefault(value, set()).add(pid)
        common = sorted(value for value, pids in owners.items() if value and len(pids) >= people)
        if len(common) > 1:
            found[name] = common
    return found


def encode(attributes: Mapping[str, list[str]], values: Mapping[str, list[str]]) -> Labels:
    """The pictures' attributes as numbers of ``values``."""
    places = {name: {value: c for c, value in enumerate(known)} for name, known in values.items()}
    return {name: np.array([place.get(v, -1) for v in attributes.get(name, [])]) for name, place in places.items()}


class AttributeProbe:
    """Predicts every attribute of ``values``; each chooses view, width and ridge on people held out of the probe's."""

    def __init__(self, config: AttributeConfig, values: Mapping[str, list[str]]):
        self.config = config
        self.columns: dict[str, slice] = {}
        first = 0
        for name, known in values.items():
            self.columns[name] = slice(first, first + len(known))
            first += len(known)

    def fit(
        self,
        features_ND: Tensor,
        labels: Labels,
        pids_N: np.ndarray,
        *,
        seed: int,
        positions: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Learn from stored features and their labels; of codes also from the ``positions`` behind them. ConfigError
        naming ``attack.people`` for too few people."""
        self.positions = positions
        forms = self._forms(features_ND)
        some = np.random.default_rng([seed, 0xA77]).permutation(len(pids_N))[: self.config.pictures]
        fit, held = (some[rows] for rows in split_people(pids_N[some], seed))
        self._choose(forms, labels, fit, held)
        rows = torch.from_numpy(some)
        self.views = {(form, name): fit_view(name, of_ND[rows]) for form, of_ND in forms.items() for name in VIEWS}
        targets_NV = self._targets(labels, some).to(features_ND.device)
        self.models = {
            choice: kernel_ridge.fit(
                self.views[choice[:2]](forms[choice[0]][rows]),
                targets_NV,
                width=choice[2],
                ridge=choice[3],
            )
            for choice in set(self.chosen.values())
        }

    def _forms(self, features_MD: Tensor) -> dict[str, Tensor]:
        """Features as they are stored, and what was coded in them, if that is known."""
        coded = {} if self.positions is None else {"coded": self.positions(features_MD)}
        return {"stored": features_MD, **coded}

    def _choose(self, forms: Mapping[str, Tensor], labels: Labels, fit: np.ndarray, held: np.ndarray) -> None:
        config, targets_FV = self.config, self._targets(labels, fit).to(forms["stored"].device)
        # The first of all for an attribute that is known of nobody held out.
        best = dict.fromkeys(self.columns, -1.0)
        self.chosen = dict.fromkeys(self.columns, ("stored", VIEWS[0], config.widths[0], config.ridges[0]))
        for form, name in product(forms, VIEWS):
            of_ND = forms[form]
            view = fit_view(name, of_ND[torch.from_numpy(fit)])
            known_FK, asked_HK = (view(of_ND[torch.from_numpy(rows)]) for rows in (fit, held))
            for w, r, scores_HV in kernel_ridge.sweep(known_FK, targets_FV, asked_HK, config.widths, config.ridges):
                for attribute, columns in self.columns.items():
                    named_H = scores_HV[:, columns].argmax(1).cpu().numpy()
                    accuracy = balanced_accuracy(named_H, labels[attribute][held])
                    if accuracy > best[attribute]:
                        best[attribute] = accuracy
                        self.chosen[attribute] = (form, name, config.widths[w], config.ridges[r])

    def predict(self, features_MD: Tensor) -> Labels:
        """The number of the value that each feature speaks for, by attribute."""
        found, forms = {}, self._forms(features_MD)
        for name, choice in self.chosen.items():
            scores_MV = self.models[choice].predict(self.views[choice[:2]](forms[choice[0]]))
            found[name] = scores_MV[:, self.columns[name]].argmax(1).cpu().numpy()
        return found

    def _targets(self, labels: Labels, rows: np.ndarray) -> Tensor:
        """Float64 (N, V): 1 for a picture's own value over the share of pictures that have it, so that all values
        start equal and the largest regressed one names the value. A picture of unknown value says nothing: 1."""
        parts = []
        for name, columns in self.columns.items():
            label_N = labels[name][rows]
            known_N1 = (label_N >= 0)[:, None]
            one_NC = (label_N[:, None] == np.arange(columns.stop - columns.start)).astype(np.float64)
            share_C = one_NC.sum(0) / max(known_N1.sum(), 1)
            parts.append(np.where(known_N1, one_NC / np.maximum(share_C, 1e-12), 1.0))
        return torch.from_numpy(np.concatenate(parts, 1))


def balanced_accuracy(named_M: np.ndarray, label_M: np.ndarray) -> float:
    """The mean over the values that occur of the share of pictures for which the value is named; NaN without any."""
    shares = [(named_M[label_M == value] == value).mean() for value in np.unique(label_M[label_M >= 0])]
    return float(np.mean(shares)) if shares else float("nan")


def attribute_leak(
    aux: Pictures,
    query: Pictures,
    features: Mapping[str, tuple[Tensor, Tensor]],
    config: AttributeConfig,
    bootstrap: Bootstrap,
    *,
    seed: int,
    progress: Progress,
    positions: Mapping[str, Callable[[Tensor], Tensor] | None] | None = None,
) -> dict[str, Any] | None:
    """What ``features`` (auxiliary and query ones, of "control" and "protected") tell of every attribute, JSON-ready;
    ``positions`` find what was coded in them, where they are codes.

    ``each`` attribute and the ``mean`` of all: balanced accuracies and r, as an attacker's. None where the pictures
    have no attribute with two values that enough people have.
    """
    values = {
        name: [value for value in known if value in set(query.attributes.get(name, []))]
        for name, known in common_values(aux.attributes, aux.pids_N, config.people).items()
    }
    values = {name: known for name, known in values.items() if len(known) > 1}
    if not values:
        progress("attributes: the pictures have no labels that enough people share, so none is predicted")
        return None
    labels, asked = encode(aux.attributes, values), encode(query.attributes, values)
    chance = {name: np.full(len(bootstrap.weight_BK), 1 / len(known)) for name, known in values.items()}
    accuracies = {"floor": chance}
    for role, (aux_ND, query_QD) in features.items():
        probe = AttributeProbe(config, values)
        probe.fit(aux_ND, labels, aux.pids_N, seed=seed, positions=(positions or {}).get(role))
        named = probe.predict(query_QD)
        accuracies[role] = {name: _accuracy(bootstrap, named[name], asked[name]) for name in values}
        progress(f"attributes, {role}: balanced accuracy {np.mean([a_B[0] for a_B in accuracies[role].values()]):.3f}")

    def result(names: list[str]) -> dict[str, Any]:
        means = {f"{role}_B": np.mean([of[name] for name in names], 0) for role, of in accuracies.items()}
        return asdict(compare(bootstrap, **means))

    each = {name: {"classes": len(known), **result([name])} for name, known in values.items()}
    return {"each": each, "mean": result(list(values))}


def _accuracy(bootstrap: Bootstrap, named_Q: np.ndarray, label_Q: np.ndarray) -> np.ndarray:
    """(B + 1): the balanced accuracy of all identities first, then of each resample."""
    shares_CB = bootstrap.means(
        {f"value {v}": np.where(label_Q == v, named_Q == v, np.nan) for v in np.unique(label_Q[label_Q >= 0])}
    )
    occurs_CB = np.isfinite(shares_CB)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(occurs_CB, shares_CB, 0).sum(0) / occurs_CB.sum(0)
