"""What ``report.json`` holds, and the check that a report holds exactly that.

A shape is a dictionary of its keys, a one-element list of its items, :class:`Named` (free names to one shape),
:class:`Maybe` (or null), or a tuple of the types of a single value. ``docs/report.md`` says what each key means.
Null is what was not or could not be measured, and the end of an interval that is unbounded.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from ppreid_dist.errors import DataError

SCHEMA = "ppreid-report/8"


@dataclass(frozen=True)
class Named:
    shape: Any


@dataclass(frozen=True)
class Maybe:
    shape: Any


TEXT, FLAG, WHOLE, NUMBER = (str,), (bool,), (int,), (int, float)
INTERVAL = {"value": Maybe(NUMBER), "low": Maybe(NUMBER), "high": Maybe(NUMBER)}
RANKING = {"mAP": NUMBER, "rank1": NUMBER, "rank5": NUMBER, "rank10": NUMBER, "mINP": NUMBER}
TRAINING = {
    "steps": WHOLE,
    "images": WHOLE,
    "seconds": NUMBER,
    "images_per_second": NUMBER,
    "data_wait": NUMBER,
    "method": TEXT,
}
LEAK = {**INTERVAL, "attacker": Maybe(TEXT)}
ROLES = {"protected": Maybe(NUMBER), "control": Maybe(NUMBER), "floor": Maybe(NUMBER)}
ATTACKER = {
    **ROLES,
    "r": INTERVAL,
    "status": TEXT,
    "reason": Maybe(TEXT),
}
AXIS = {
    "metric": TEXT,
    "leak": {**LEAK, "against": Maybe(TEXT), "own": LEAK},
    "worst": Maybe(
        {
            "attacker": TEXT,
            "against": Maybe(TEXT),
            "people": WHOLE,
            **ROLES,
            "r": Maybe(NUMBER),
        }
    ),
    "urr": {
        **INTERVAL,
        "display": TEXT,
        "status": TEXT,
        "reason": Maybe(TEXT),
        "broken": FLAG,
        "raw": Maybe(NUMBER),
        "base": Maybe(NUMBER),
    },
    "attackers": Named(ATTACKER),
    "curve": [{"n": WHOLE, "r": LEAK, "attackers": Named(INTERVAL)}],
    "n50": {"value": Maybe(NUMBER), "text": TEXT},
}
SHAPE = {
    "schema": TEXT,
    "protocol": TEXT,
    "name": TEXT,
    "created": TEXT,
    "versions": Named(TEXT),
    "machine": {"cpu": TEXT, "cores": WHOLE, "gpu": Maybe(TEXT)},
    "utility": {"control": RANKING, "protected": RANKING, "ratio": INTERVAL, "matching": TEXT},
    "axes": Named(AXIS),
    "attributes": Maybe({"each": Named({"classes": WHOLE, **ATTACKER}), "mean": ATTACKER}),
    "whitebox": Maybe(
        {
            "people": WHOLE,
            "seconds": NUMBER,
            "matched": {"control": NUMBER, "protected": NUMBER},
            "axes": Named({**ATTACKER, "without": INTERVAL}),
        }
    ),
    "linkage": Maybe(
        [{"other": TEXT, "learnt": FLAG, "d_sys": NUMBER, "null": NUMBER, "rank1": NUMBER, "chance": NUMBER}]
    ),
    "auxiliary": Maybe(
        [
            {
                "variant": TEXT,
                "people": WHOLE,
                "axes": Named(
                    {
                        "attacker": TEXT,
                        **ROLES,
                        "r": INTERVAL,
                        "reason": Maybe(TEXT),
                    }
                ),
            }
        ]
    ),
    "pixels": Named({"l1": ROLES, "psnr": ROLES}),
    "kid": Maybe({"backbone": TEXT, "pictures": WHOLE, "attackers": Named(ROLES)}),
    "judges": Named({"name": TEXT, "mAP": NUMBER, "rank1": NUMBER, "note": TEXT}),
    "probe": Maybe(
        {
            "apparent": Maybe(NUMBER),
            "fresh": NUMBER,
            "gap": Maybe(NUMBER),
            "warned": FLAG,
            "history": [{"step": WHOLE, "images": WHOLE, "apparent": Maybe(NUMBER), "fresh": NUMBER}],
            "unit": TEXT,
        }
    ),
    "training": {"control": TRAINING, "protected": TRAINING},
    "attack": {"seconds": NUMBER, "people": WHOLE, "leaked": WHOLE, "notes": [TEXT]},
    "notes": [TEXT],
}


def check_report(report: Any, where: str) -> None:
    """Raise DataError, one line that starts with ``where`` and names the key, unless ``report`` has the shape.

    An unknown key is an error too: the page would not show it, and every number of the file must be on the page.
    """
    try:
        _check(report, SHAPE, "")
        if report["schema"] != SCHEMA:
            raise DataError(f"schema is {report['schema']!r}, not {SCHEMA!r}")
        for name in report["axes"]:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):  # an axis names its figures' files
                raise DataError(f"axes: {name!r} is not a lower-case word")
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _check(value: Any, shape: Any, key: str) -> None:
    inside = f"{key}." if key else ""
    if isinstance(shape, Maybe):
        if value is not None:
            _check(value, shape.shape, key)
    elif isinstance(shape, (dict, Named)):
        if not isinstance(value, dict):
            raise DataError(f"{key or 'report'} holds no keys and values")
        if isinstance(shape, Named):
            shape = dict.fromkeys(value, shape.shape)
        if missing := [name for name in shape if name not in value]:
            raise DataError(f"{inside}{missing[0]} is missing")
        if unknown := [name for name in value if name not in shape]:
            raise DataError(f"{inside}{unknown[0]} is not a key of {SCHEMA}")
        for name, part in shape.items():
            _check(value[name], part, f"{inside}{name}")
    elif isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            raise DataError(f"{key} is not a list")
        for i, item in enumerate(value):
            _check(item, shape[0], f"{key}[{i}]")
    else:
        if not isinstance(value, shape) or (isinstance(value, bool) and shape is not FLAG):
            names = " or ".join(kind.__name__ for kind in shape)
            raise DataError(f"{key} is a {type(value).__name__}, not {names}")
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{key} is {value}; JSON has no such number, say null")
