"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb (offline, unless one logs in) by Accelerate."""

import json
import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor

from ppreid_dist import distributed
from ppreid_dist.errors import DataError, MissingExtra
from ppreid_dist.files import read_json, write_json, write_text
from ppreid_dist.training.adversary import Metrics


class Averages:
    """Means of metrics between two rows of the log, kept where the metrics are: one reduction over ranks a row."""

    def __init__(self, device: torch.device):
        self._device = device
        self._sums: dict[str, tuple[Tensor | float, int]] = {}

    def note(self, metrics: Metrics, group: str = "") -> None:
        """Count one value of each metric, named ``group/name`` where a group is given."""
        for key, value in metrics.items():
            name = f"{group}/{key}" if group else key
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + (value.detach().float() if isinstance(value, Tensor) else value), count + 1

    def take(self) -> dict[str, float]:
        """The means over values and ranks, which must have noted the same metrics; begins anew."""
        names = sorted(self._sums)
        means = [total / count for total, count in (self._sums[name] for name in names)]
        stacked = torch.stack([torch.as_tensor(mean, dtype=torch.float32, device=self._device) for mean in means])
        self._sums = {}
        return dict(zip(names, distributed.mean_over_ranks(stacked).tolist(), strict=True))


class JsonlTracker(GeneralTracker):
    """One JSON object a line: ``{"step": …, "images": …, "loss/identity": …}``."""

    name = "jsonl"
    requires_logging_directory = True

    def __init__(self, file: Path):
        super().__init__()
        self.file = file

    @property
    def tracker(self) -> Path:
        return self.file

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        return None  # config.yaml holds it

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        try:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise DataError(f"{self.file}: could not be written: {error.strerror}") from error


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def rewind_metrics(file: Path, step: int) -> None:
    """Drop what a killed run logged after the checkpoint of ``step``; the resumed run logs it again."""
    rows = [row for row in read_metrics(file) if row["step"] <= step]
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def open_trackers(names: list[str], run_folder: Path) -> list[Any]:
    """What Accelerate's ``log_with`` takes. MissingExtra if a tracker's package isn't installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtra(f"the tracker {name}", "track")
    return [JsonlTracker(run_folder / "metrics.jsonl"), *names]


def tracker_options(names: list[str], run_folder: Path) -> dict[str, dict[str, Any]]:
    """``init_kwargs`` of Accelerate's trackers, for the process that logs. What the environment says by WANDB_… stays.

    A run that goes on is the same one to wandb, too: its number is kept in ``wandb.json``.
    """
    if "wandb" not in names:
        return {}
    file = run_folder / "wandb.json"
    if not file.is_file():
        write_json(file, {"id": uuid4().hex})
    options = {
        "WANDB_DIR": ("dir", str(run_folder)),
        "WANDB_NAME": ("name", run_folder.name),
        "WANDB_RUN_ID": ("id", read_json(file)["id"]),
        "WANDB_RESUME": ("resume", "allow"),
    }
    if not _knows_an_account():
        # Without a terminal wandb would raise; nobody should need an account to train.
        options["WANDB_MODE"] = ("mode", "offline")
    return {"wandb": dict(option for variable, option in options.items() if variable not in os.environ)}


def _knows_an_account() -> bool:
    """Whether somebody logged in to wandb's server here, by the places where wandb itself looks for that."""
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        logins = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(urlsplit(settings.base_url).netloc) is not None
