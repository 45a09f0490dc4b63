"""Where a run's numbers go: its log always, trackers beside it, wandb offline where nobody is logged in."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import run

from ppreid_dist.errors import DataError
from ppreid_dist.training.tracking import JsonlTracker, read_metrics, tracker_options


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody who isn't logged in to wandb; what it found out is forgotten before and after."""
    wandb = pytest.importorskip("wandb")
    for variable in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb.teardown()
    yield
    wandb.teardown()


def test_a_log_that_can_t_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: could not be written: Is a directory$"):
        (tmp_path / "metrics.jsonl").mkdir()
        JsonlTracker(tmp_path / "metrics.jsonl").log({"a": 1.0}, step=1)


@pytest.mark.usefixtures("nobody")
def test_trackers_write_beside_the_log(world: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    settings = ("engine.trackers=[wandb,tensorboard]", "training.images=48", "privacy.weight=0")
    run(world, folder, *settings)
    (once,) = folder.rglob("*.wandb")
    assert list(folder.rglob("events.out.tfevents.*"))
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 3
    run(world, folder, *settings, resume=True)
    parts = list(folder.rglob("*.wandb"))
    assert len(parts) == 2 and {part.name for part in parts} == {once.name}, "another run of wandb's"


@pytest.mark.usefixtures("nobody")
def test_wandb_is_offline_where_nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def options() -> dict[str, str]:
        wandb.teardown()
        return tracker_options(["wandb"], tmp_path)["wandb"]

    logged_out = options()
    assert logged_out["mode"] == "offline" and logged_out["name"] == tmp_path.name
    logged_in = {key: value for key, value in logged_out.items() if key != "mode"}
    (tmp_path / "netrc").write_text("machine wandb.example login user password " + 40 * "a" + "\n")
    assert options() == logged_out
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert options() == logged_in
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    assert options() == logged_in
    monkeypatch.setenv("WANDB_NAME", "of a sweep")
    assert options() == {key: value for key, value in logged_in.items() if key != "name"}
    assert tracker_options(["tensorboard"], tmp_path) == {}
