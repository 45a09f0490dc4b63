"""`ppreid features`: what a finished run stores of new pictures."""

from pathlib import Path

import pytest
import torch
from commands import ppreid

from ppreid_dist.experiment import Config, train
from ppreid_dist.files import read_tensors
from ppreid_dist.settings import load_settings


@pytest.fixture(scope="module")
def run(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, evaluated."""
    folder = tmp_path_factory.mktemp("features") / "run"
    few = ["privacy.weight=0", "training.images=32", f"output={folder}"]
    train(load_settings(Config, None, [*world, *few]), progress=False)
    ppreid("evaluate", str(folder))
    return folder


def features(file: Path) -> tuple[torch.Tensor, list[str]]:
    return read_tensors(file)["features"], file.with_suffix(".keys.txt").read_text().splitlines()


def pictures(world: list[str]) -> Path:
    return Path(next(s for s in world if s.startswith("data.root=")).partition("=")[2]) / "images"


def test_a_file_s_feature_is_that_of_evaluate(world: list[str], run: Path, tmp_path: Path) -> None:
    evaluated, keys = features(run / "features" / "query.safetensors")
    files = [str(pictures(world) / f"{key.partition('_')[2]}.jpg") for key in keys]
    said = ppreid("features", str(run), *files, "--out", str(tmp_path / "new.safetensors")).stdout
    found, names = features(tmp_path / "new.safetensors")
    assert torch.equal(found, evaluated) and names == files and found.dtype == torch.float32
    assert f"{len(files)} features of {found.shape[1]} numbers" in said
    # Alone, and from a folder.
    folder = tmp_path / "some" / "camera"
    folder.mkdir(parents=True)
    (folder / "b.JPG").write_bytes(Path(files[3]).read_bytes())
    (folder / "notes.txt").touch()
    ppreid("features", str(run), str(tmp_path / "some"), "--out", str(tmp_path / "one.safetensors"))
    one, (name,) = features(tmp_path / "one.safetensors")
    torch.testing.assert_close(one, evaluated[3:4], rtol=0, atol=1e-6)
    assert name == str(folder / "b.JPG")


def test_mistakes_are_one_line_and_leave_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "there.safetensors").touch()
    for picture, out, message in (
        ("gone.jpg", "new.safetensors", "gone.jpg: can't be read: No such file"),
        ("text.jpg", "new.safetensors", "text.jpg: can't be decoded by pillow"),
        ("empty", "new.safetensors", "empty: no picture in it"),
        ("text.jpg", "new.npy", "--out: "),
        ("text.jpg", "there.safetensors", "there.safetensors: already exists"),
    ):
        said = ppreid("features", str(run), str(tmp_path / picture), "--out", str(tmp_path / out), expect=2).stderr
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert message in line and "Traceback" not in said
    assert not list(tmp_path.glob("new*"))
