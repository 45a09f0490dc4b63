"""A finished run whose gallery keeps something else: ``ppreid store RUN --out DIR model.store.kind=…``.

Nothing is trained. DIR is a run of its own for `ppreid evaluate` and `ppreid attack`; RUN is its control, or was itself
trained with protection: then DIR also gets the generator that it was trained against, for the adaptive attacker.
"""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ppreid_dist.attacks.adaptive import hand_on
from ppreid_dist.data.dataset import open_training
from ppreid_dist.data.stream import load_pictures
from ppreid_dist.errors import ConfigError, DataError, RunError
from ppreid_dist.evaluation.export import stored_features
from ppreid_dist.experiment import Config, load_run
from ppreid_dist.files import atomic, check_writable
from ppreid_dist.models.folder import load_extractor, save_extractor
from ppreid_dist.models.store import KINDS, make_store
from ppreid_dist.models.stores.base import PUBLIC_KEY, StoreConfig
from ppreid_dist.settings import load_settings, path_override, save_settings
from ppreid_dist.transfer import default_device

STORED = "model.store."


def store(run: Path, out: Path, settings: Sequence[str], *, progress: bool = True) -> StoreConfig:
    """Make ``out`` the run ``run`` with other ``model.store.*`` settings, fitted on its own training pictures.

    ``out`` appears whole or not at all; returns how it stores. ConfigError for any other setting, one that its kind
    doesn't have, or none that changes anything; RunError where ``run`` isn't finished or stores otherwise already, or
    ``out`` is there; DataError where it can't be written.
    """
    for setting in settings:
        if not setting.startswith(STORED):
            raise ConfigError(f"{setting.partition('=')[0]}: can't be changed after training; only {STORED}* can")
    if os.path.lexists(out):
        raise RunError(f"{out}: already exists; choose another --out")
    check_writable(out)  # or it would be known only when all is fitted
    before = load_run(run)
    if (how := before.model.store.in_words) != "plain":
        raise RunError(f"{run}: its features are stored as {how} already; store the plain run")
    config = load_settings(Config, run / "config.yaml", [*settings, path_override("output", out)])
    chosen = config.model.store
    for key in (setting.partition("=")[0].removeprefix(STORED).partition(".")[0] for setting in settings):
        if key not in ("kind", "quantise", *KINDS[chosen.kind].uses):
            raise ConfigError(f"{STORED}{key}: {STORED}kind={chosen.kind} has none")
    if (chosen.kind, chosen.quantise) == ("plain", "none"):
        raise ConfigError(
            f"{STORED}kind: plain features are what {run} stores already; name what is to be kept instead"
        )
    device = default_device()
    saved = load_extractor(run / "model", device)
    kept = make_store(config.model.store, saved.extractor.feature_dim).to(device)
    if kept.needs_features:
        load = partial(
            load_pictures, open_training(config.data, streamed=False), backend=config.data.stream.backend,
            device=device, progress=progress,
        )  # fmt: skip
        plain_ND = stored_features(saved.extractor, load(saved.size).images_N3HW)
        targets = load(config.model.store.decoder.size) if config.model.store.kind == "adversarial" else None
        kept.fit(plain_ND, targets.images_N3HW if targets else None)
    saved.extractor.store = kept
    secret = chosen.key != PUBLIC_KEY
    with atomic(out) as whole:
        whole.mkdir(mode=0o700 if secret else 0o777)
        for name in ("result.json", "metrics.jsonl"):
            if (run / name).is_file():
                shutil.copy2(run / name, whole / name)
        save_extractor(whole / "model", saved.extractor, config.model, saved.size, saved.about)
        hand_on(run, whole)
        save_settings(config, whole / "config.yaml")
        if secret:  # both say it, wherever they are taken
            for name in ("config.yaml", "model/extractor.json"):
                (whole / name).chmod(0o600)
    return chosen


def read_key(file: Path) -> int:
    """The key that ``file`` holds, a whole number. DataError naming the file, and never what is in it."""
    try:
        return int(file.read_text(encoding="utf-8"), 0)
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{file}: holds no whole number (0x before a hexadecimal one)") from None
