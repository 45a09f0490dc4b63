"""Shards know what shaped them and whose pictures they hold; a configuration that says otherwise is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from make_shards import forget_settings
from training_runs import run

from ppreid_dist.data.dataset import is_synthetic, open_training
from ppreid_dist.errors import DataError
from ppreid_dist.experiment import Config
from ppreid_dist.settings import load_settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.kind=market1501", "data.kind=synthetic, not with market1501"),
        ("data.split_seed=7", "data.split_seed=0, not with 7"),
        ("data.synthetic.train=25", "data.synthetic.train=24, not with 25"),
    ],
)
def test_shards_of_other_settings_are_refused(world: list[str], tmp_path: Path, setting: str, message: str) -> None:
    """…and those that don't say what they were written with are taken; where the pictures lie is no matter."""
    shards = Path(load_settings(Config, None, world).data.shards)
    with pytest.raises(DataError) as error:
        run(world, tmp_path / "run", setting)
    assert str(error.value).startswith(f"{shards}: its shards were written with {message}; ")
    assert "\n" not in str(error.value)
    shutil.copytree(shards, tmp_path / "old")
    elsewhere = [*world, "data.root=/nowhere", "data.images_per_shard=7", f"data.shards={tmp_path / 'old'}"]
    open_training(load_settings(Config, None, elsewhere).data)
    forget_settings(tmp_path / "old")
    open_training(load_settings(Config, None, [*elsewhere, setting]).data)


def test_people_are_synthetic_where_their_shards_say_so(world: list[str], tmp_path: Path) -> None:
    """Whose pictures a report may show hangs on it: never on a setting, whose default is synthetic."""
    data = load_settings(Config, None, world).data
    assert is_synthetic(data)
    shutil.copytree(data.shards, tmp_path / "real")
    forget_settings(tmp_path / "real")
    real = replace(data, shards=str(tmp_path / "real"))
    assert real.kind == "synthetic" and not is_synthetic(real)
    meta = json.loads((tmp_path / "real" / "meta.json").read_text())
    for known in ({"kind": "market1501"}, {"settings": {"data.kind": "market1501"}}):
        (tmp_path / "real" / "meta.json").write_text(json.dumps(meta | known))
        assert not is_synthetic(real)
        with pytest.raises(DataError, match=r"written with data\.kind=market1501, not with synthetic; [^\n]*$"):
            open_training(real)
