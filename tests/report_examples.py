"""Made-up reports for the tests of the report: a good one and one with every warning."""

from typing import Any


def interval(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


def attacker(scores: tuple[float, float, float], r: tuple[Any, Any, Any], reason: str | None = None) -> dict[str, Any]:
    names = dict(zip(("floor", "protected", "control"), scores, strict=True))
    return {**names, "r": interval(*r), "status": "broken" if reason else "ok", "reason": reason}


def good_report() -> dict[str, Any]:
    def axis(metric: str, shift: float) -> dict[str, Any]:
        first, last = interval(0.21 + shift, 0.1, 0.32), interval(0.437 + shift, 0.381, 0.607)
        return {
            "metric": metric,
            "leak": {
                **last, "attacker": "ridge", "against": "ridge",
                "own": {**interval(0.531 + shift, 0.402, 0.664), "attacker": "gan"},
            },
            "worst": {
                "attacker": "ridge", "against": "gan", "people": 13,
                "protected": 0.5127 + shift, "control": 0.5871, "floor": 0.4116, "r": 0.576,
            },
            "urr": {
                **interval(2.247, 1.93, 2.58), "display": "2.25 [1.93, 2.58]", "status": "ok", "reason": None,
                "broken": False, "raw": 1.714, "base": 1.186,
            },
            "attackers": {
                "gan": attacker((0.3312, 0.3574, 0.4028), (0.3661, 0.29, 0.445)),
                "ridge": attacker((0.3491, 0.3912, 0.4443), (0.437 + shift, 0.381, 0.607)),
            },
            "curve": [
                {"n": 40, "r": {**first, "attacker": "gan"}, "attackers": {"gan": first}},
                {"n": 1120, "r": {**last, "attacker": "ridge"}, "attackers": {"gan": first, "ridge": last}},
            ],
            "n50": {"value": None, "text": "not reached by 1120"},
        }  # fmt: skip

    ranking = {"mAP": 0.6249, "rank1": 0.8123, "rank5": 0.9271, "rank10": 0.9587, "mINP": 0.3312}
    training = {
        "steps": 3001, "images": 192064, "seconds": 412.72, "images_per_second": 465.25, "data_wait": 0.0123,
        "method": "none",
    }  # fmt: skip
    return {
        "schema": "ppreid-report/8",
        "protocol": "synthetic seed 0 · 240 train ids · judge tiny · identity bootstrap 2000 × 95 %",
        "name": "a run",
        "created": "2026-03-02T14:05:11+00:00",
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "a CPU", "cores": 17, "gpu": None},
        "utility": {
            "control": ranking,
            "protected": {"mAP": 0.6131, "rank1": 0.8063, "rank5": 0.9254, "rank10": 0.9563, "mINP": 0.3208},
            "ratio": interval(0.9811, 0.9689, 0.9934),
            "matching": "cosine",
        },
        "axes": {"pixel": axis("SSIM on the person", 0.0), "identity": axis("mAP of the judge tiny", 0.031)},
        "attributes": {
            "each": {"hair": {"classes": 5, **attacker((0.2013, 0.3127, 0.5129), (0.3575, 0.311, 0.402))}},
            "mean": attacker((0.2513, 0.3613, 0.5413), (0.379, 0.335, 0.418)),
        },
        "whitebox": {
            "people": 27, "seconds": 41.37, "matched": {"control": 0.9871, "protected": 0.9713},
            "axes": {
                "identity": {
                    **attacker((0.0412, 0.3917, 0.4271), (0.908, 0.781, 1.021)),
                    "without": interval(0.934, 0.815, 1.062),
                }
            },
        },
        "linkage": [
            {"other": "another key", "learnt": True, "d_sys": 0.6184, "null": 0.0237, "rank1": 0.4372, "chance": 0.0114}
        ],
        "auxiliary": [
            {
                "variant": variant, "people": people,
                "axes": {
                    "identity": {
                        "attacker": "ridge", "protected": 0.3719 + shift, "control": 0.4137 + shift, "floor": 0.0893,
                        "r": interval(0.8713 + shift, 0.7619, 0.9517), "reason": None,
                    }
                },
            }
            for variant, people, shift in (("other_domain", 1453, 0.0), ("same_people", 257, 0.041))
        ],
        "judges": {"identity": {"name": "tiny", "mAP": 0.6102, "rank1": 0.7911, "note": "Trained on other people."}},
        "pixels": {
            "ridge": {
                "l1": {"protected": 0.1913, "control": 0.1517, "floor": 0.2239},
                "psnr": {"protected": 12.37, "control": 14.61, "floor": 10.92},
            }
        },
        "kid": {
            "backbone": "a backbone", "pictures": 731,
            "attackers": {"gan": {"protected": 0.0713, "control": 0.0527, "floor": 0.0691}},
        },
        "probe": {
            "apparent": 0.1812, "fresh": 0.1763, "gap": 0.0278, "warned": False, "unit": "L1 on the person",
            "history": [
                {"step": 1500, "images": 96032, "apparent": 0.1521, "fresh": 0.1543},
                {"step": 3001, "images": 192064, "apparent": 0.1812, "fresh": 0.1763},
            ],
        },
        "training": {"control": training, "protected": {**training, "seconds": 981.36, "method": "ridge λ 0.4"}},
        "attack": {"seconds": 318.45, "people": 1120, "leaked": 2048, "notes": ["a width was chosen"]},
        "notes": ["dropped 12 junk images"],
    }  # fmt: skip


def ugly_report() -> dict[str, Any]:
    report = good_report()
    pixel = report["axes"]["pixel"]
    pixel["leak"] |= interval(1.182, 1.05, 1.33)
    pixel["attackers"]["gan"] = attacker((0.402, 0.398, 0.401), (None, None, None), "it doesn't beat its floor")
    pixel["leak"]["own"] = {**interval(1.182, 1.05, 1.33), "attacker": "ridge"}
    closed = {"display": "n/a", "status": "n/a", "reason": "utility is 0.914", "raw": None, "base": None}
    pixel["urr"] = {**interval(None, None, None), **closed, "broken": False}
    report["probe"]["warned"] = True
    return report
