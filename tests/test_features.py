"""`ppreid features`: what a finished run stores of new pictures."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ppreid
from safetensors import safe_open

from ppreid_dist import files
from ppreid_dist.errors import DataError, RunError
from ppreid_dist.evaluation.export import provenance, stored_in_words
from ppreid_dist.experiment import Config, load_run, train
from ppreid_dist.features import write_features
from ppreid_dist.files import read_json, read_tensors, write_json, write_tensors
from ppreid_dist.models.stores.base import StoreConfig
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


def about(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"])


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
    ours = about(tmp_path / "one.safetensors")
    assert ours == about(run / "features" / "query.safetensors") == about(run / "features" / "gallery.safetensors")
    assert ours == provenance(run / "model", StoreConfig()) and ours["stored"] == "plain"


def test_packed_codes_match_as_the_others_do(world: list[str], run: Path, tmp_path: Path) -> None:
    codes = ["model.store.kind=codes", "model.store.dim=100", "model.store.axes=4"]
    ppreid("store", str(run), "--out", str(tmp_path / "codes"), *codes)
    some = [str(picture) for picture in sorted(pictures(world).glob("*.jpg"))[:5]]
    for name, packed in (("plain", []), ("packed", ["--packed"])):
        said = ppreid(
            "features", str(tmp_path / "codes"), *some, "--out", str(tmp_path / f"{name}.safetensors"), *packed
        )
        assert "5 features of 100 numbers" in said.stdout
    tensors = read_tensors(tmp_path / "packed.safetensors")
    assert tensors["features"].shape == (5, 13) and tensors["features"].dtype == torch.uint8
    bits = np.unpackbits(tensors["features"].numpy(), axis=1, count=int(tensors["dim"]))
    apart = (bits[:, None] != bits).sum(2)
    plain = features(tmp_path / "plain.safetensors")[0]
    np.testing.assert_allclose(1 - 2 * apart / 100, plain @ plain.T, atol=1e-6)
    assert about(tmp_path / "packed.safetensors") == about(tmp_path / "plain.safetensors")
    with pytest.raises(RunError, match=r"^--packed: .*run stores float32 numbers \(plain\)"):
        write_features(run, [Path(some[0])], tmp_path / "none.safetensors", packed=True)
    assert not list(tmp_path.glob("none*"))


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


@pytest.mark.parametrize("out", ["/proc/none/new", "{}/file/new", "{}/" + 250 * "x", "{}/link/new"])
def test_what_could_not_be_written_is_refused_before_anything_is_decoded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr("ppreid_dist.data.decode.Decoder.decode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("ppreid_dist.storing.load_extractor", lambda *_: pytest.fail("went on"))
    for name in ("file", "a.jpg"):
        (tmp_path / name).touch()
    for name in ("link", "link.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    out = out.format(tmp_path)
    file, folder = f"{out}.safetensors", f"{out}.{7 * 'x'}"
    said = ppreid("features", str(run), str(tmp_path / "a.jpg"), "--out", file, expect=2).stderr
    assert said.startswith(f"error: {file}: can't be written to: ")
    said = ppreid("store", str(run), "--out", folder, "model.store.kind=signs", expect=2).stderr
    assert said.startswith(f"error: {folder}: can't be written to: ")
    for arguments in (["features", str(run), str(tmp_path / "a.jpg")], ["store", str(run), "model.store.kind=signs"]):
        said = ppreid(*arguments, "--out", str(tmp_path / "link.safetensors"), expect=2).stderr
        assert "link.safetensors: already exists; choose another --out" in said


def test_an_evaluation_that_could_not_be_written_is_refused_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppreid_dist.assessment.load_extractor", lambda *_: pytest.fail("went on"))
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("features"))
    (tmp_path / "run" / "features").touch()
    said = ppreid("evaluate", str(tmp_path / "run"), expect=2).stderr
    assert said == f"error: {tmp_path / 'run' / 'features'}: can't be written to: Not a directory\n"


def test_a_run_may_be_stored_in_a_folder_of_any_name(run: Path, tmp_path: Path) -> None:
    for name in ("st: 1", "a #2", "0123", "größer 😀"):
        ppreid("store", str(run), "--out", str(tmp_path / name), "model.store.kind=signs")
        assert load_run(tmp_path / name).output == str(tmp_path / name)
    said = ppreid("store", str(run), "--out", str(tmp_path / "\udcff"), "model.store.kind=signs", expect=2).stderr
    assert said.startswith("error: output: ") and said.endswith("is not UTF-8\n")


def test_hidden_files_are_passed_over_and_other_endings_told(
    world: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "some"
    (folder / ".thumbs").mkdir(parents=True)
    (folder / "folder.jpg").mkdir()
    picture = next(pictures(world).glob("*.jpg")).read_bytes()
    for name in ("a.jpg", "b.webp", ".thumbs/c.jpg"):
        (folder / name).write_bytes(picture)
    for name in ("._a.jpg", ".DS_Store", "notes.txt"):
        (folder / name).write_text("no picture")
    assert write_features(run, [folder], tmp_path / "new.safetensors")[0] == 1
    assert features(tmp_path / "new.safetensors")[1] == [str(folder / "a.jpg")]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{folder}: files skipped that don't end in .jpg, .jpeg, .png, .bmp: 2"]


@pytest.mark.parametrize(
    ("name", "message"), [(b"\xff.jpg", "'{}/\\udcff.jpg': its name isn't UTF-8"), (b"a\nb.jpg", "'{}/a\\nb.jpg': its")]
)
def test_a_name_that_is_no_line_is_refused_before_anything_is_decoded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, message: str
) -> None:
    monkeypatch.setattr("ppreid_dist.features.Decoder.decode", lambda *_: pytest.fail("decoded"))
    (tmp_path / "a.jpg").touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    with pytest.raises(DataError) as caught:
        write_features(run, [tmp_path], tmp_path / "new.safetensors")
    said = str(caught.value)
    assert said.startswith(message.format(tmp_path)) and said.isascii() and "\n" not in said
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "plain"),
        (["quantise=int8"], "int8"),
        (["kind=pca", "dim=16", "quantise=int8"], "pca (dim 16), int8"),
        (["kind=signs"], "signs (public key)"),
        (["kind=noise", "strength=2", "key=71"], "noise (strength 2.0, key of its own)"),
        (
            ["kind=codes", "dim=1024", "axes=16", "spectrum=shell", "key=71"],
            "codes (dim 1024, axes 16, width 0.5, spectrum shell, key of its own)",
        ),
        (
            ["kind=adversarial"],
            "adversarial (strength 0.5, ascent 20, decoder (size 64×32, width 32, steps 1500, batch 64, lr 0.002), "
            "public key)",
        ),
    ],
)
def test_how_a_gallery_stores_is_told_without_the_key(settings: list[str], words: str) -> None:
    assert stored_in_words(load_settings(StoreConfig, None, settings)) == words


def test_a_features_file_tells_of_which_model_it_is(run: Path, tmp_path: Path) -> None:
    whole = provenance(run / "model", StoreConfig())
    copy = tmp_path / "copy"
    shutil.copytree(run / "model", copy)
    assert provenance(copy, StoreConfig()) == whole
    other = read_json(copy / "extractor.json")
    other["settings"]["store"]["key"] = 71
    write_json(copy / "extractor.json", other)
    assert provenance(copy, StoreConfig())["model"] != whole["model"]


def test_what_is_written_is_copied_only_where_storage_is_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save, given = files.save_file, {}
    monkeypatch.setattr(files, "save_file", lambda tensors, *more: (given.update(tensors), save(tensors, *more)))
    alone, shared = torch.rand(3, 4), torch.rand(6, 2)
    tensors = {"alone": alone, "turned": alone.T, "first": shared[:3], "all": shared, "tied": shared}
    write_tensors(tmp_path / "a.safetensors", tensors, about={"é": "|"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert given["alone"].data_ptr() == alone.data_ptr() and given["first"].data_ptr() == shared.data_ptr()
    assert about(tmp_path / "a.safetensors") == {"é": "|"}


def test_tensors_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    """As the JSON beside them; safetensors itself makes files for their owner alone."""
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.json").stat().st_mode
