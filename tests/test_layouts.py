"""Folders of every layout to records: names, splits, junk, and what is refused."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppreid_dist.data.catalog import KINDS, read_catalog
from ppreid_dist.data.layouts import parse_name
from ppreid_dist.errors import ConfigError, DataError, PPReIDError

PIDS, CAMERAS = st.integers(0, 99999), st.integers(0, 999)
WORDS = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=12)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")


def market(root, train, query, gallery):
    touch(*(root / "bounding_box_train" / n for n in train))
    touch(*(root / "query" / n for n in query))
    touch(*(root / "bounding_box_test" / n for n in gallery))
    return root


def small_market(root):
    return market(
        root,
        ["0002_c1s1_000451_03.jpg", "0002_c12s1_000452_03.jpg", "0007_c3s1_000001_01.jpg"],
        ["0001_c1s1_000151_00.jpg", "0003_c2s1_000151_00.jpg"],
        ["0001_c1s1_1_1.jpg", "0001_c4s1_1_1.jpg", "0003_c2s6_1_1.jpg", "-1_c1s1_000401_03.jpg", "0000_c1s1_2_1.jpg"],
    )


def error(kind, root):
    with pytest.raises(PPReIDError) as caught:
        read_catalog(kind, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names


@given(
    PIDS,
    CAMERAS,
    st.one_of(st.none(), st.integers(0, 99)),
    WORDS,
    st.sampled_from([".jpg", ".jpg.jpg", ".JPG", ".png"]),
)
def test_market_names_round_trip(pid, camid, sequence, rest, suffix):
    part = "" if sequence is None else f"s{sequence}"
    assert parse_name("market", f"{pid:04d}_c{camid}{part}_{rest}{suffix}") == (pid, camid)


@given(PIDS, PIDS, CAMERAS, WORDS)
def test_msmt17_names_round_trip(pid, number, camid, rest):
    assert parse_name("msmt17", f"{pid:04d}_{number:03d}_{camid:02d}_{rest}.jpg") == (pid, camid)


@given(PIDS, st.integers(0, 180))
def test_viper_names_round_trip(pid, angle):
    assert parse_name("viper", f"{pid:03d}_{angle}.bmp") == (pid, angle)


@given(st.sampled_from(["market", "msmt17", "viper"]), st.text(max_size=30))
def test_any_other_name_is_refused_or_starts_with_its_pid(layout, name):
    numbers = parse_name(layout, name)
    assert numbers is None or int(name.split("_")[0]) == numbers[0]


@pytest.mark.parametrize(
    ("layout", "name", "numbers"),
    [
        ("market", "-1_c1s1_000401_03.jpg", (-1, 1)),
        ("market", "0000_c6s1_000401_03.jpg", (0, 6)),
        ("market", "0001_c12_f0046302.jpg", (1, 12)),
        ("market", "0001_c1_1.png", (1, 1)),
        ("market", "-2_c1s1_000401_03.jpg", None),
        ("market", "0001c1s1_000401_03.jpg", None),
        ("market", "x0001_c1s1_000401_03.jpg", None),
        ("market", "0001_c1s1_000401_03.gif", None),
        ("market", "٣_c1s1_000401_03.jpg", None),
        ("msmt17", "0000_000_01_0303morning_0015_0.jpg", (0, 1)),
        ("msmt17", "0000_000.jpg", None),
        ("viper", "000_45.jpg", None),
    ],
)
def test_names_of_the_field(layout, name, numbers):
    assert parse_name(layout, name) == numbers


# --- folders


def test_market_drops_junk_keeps_distractors_and_sorts(tmp_path):
    # The folder's own name looks like a picture's: only the basename may be parsed.
    catalog = read_catalog("market1501", small_market(tmp_path / "0099_c9s9_1_1.jpg"))
    assert [(r.split, r.pid, r.camid) for r in catalog.records] == [
        ("train", 2, 12), ("train", 2, 1), ("train", 7, 3),
        ("query", 1, 1), ("query", 3, 2),
        ("gallery", 0, 1), ("gallery", 1, 1), ("gallery", 1, 4), ("gallery", 3, 2),
    ]  # fmt: skip
    assert catalog.counts() == {"train": (2, 3, 3), "query": (2, 2, 2), "gallery": (2, 4, 3)}
    assert catalog.notes == (
        "dropped 1 junk images (pid -1)",
        "train: 1 identities with a single image",
        "train: 1 identities with a single camera",
        "gallery: 1 distractors (pid 0), counted as images and not as an identity",
        "query: 1 images whose identity isn't in the gallery under another camera",
    )


def test_files_that_are_no_pictures_are_passed_over(tmp_path):
    root = small_market(tmp_path)
    touch(root / "query" / "Thumbs.db", root / "query" / "readme.txt", root / "query" / "._0001_c1s1_000151_00.jpg")
    assert read_catalog("market1501", root).counts()["query"] == (2, 2, 2)


@pytest.mark.parametrize("folder", ["bounding_box_train", "query", "bounding_box_test"])
def test_a_missing_or_empty_folder_is_named(tmp_path, folder):
    root = small_market(tmp_path)
    for path in (root / folder).iterdir():
        path.unlink()
    assert str(root / folder) in error("market1501", root)
    (root / folder).rmdir()
    message = error("market1501", root)
    assert str(root / folder) in message
    assert "market1501" in message


def test_a_split_of_junk_only_has_no_picture(tmp_path):
    root = market(tmp_path, ["0002_c1s1_1_1.jpg"], ["0001_c1s1_1_1.jpg"], ["-1_c1s1_1_1.jpg"])
    assert "gallery split has no picture" in error("market1501", root)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_empty_or_wrong_folder(tmp_path, kind):
    assert "no such" in error(kind, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in error(kind, tmp_path / "empty")
    touch(tmp_path / "wrong" / "pictures" / "0001_c1s1_1_1.jpg")
    assert str(tmp_path / "wrong") in error(kind, tmp_path / "wrong")


def test_a_file_is_no_folder_and_a_kind_must_be_known(tmp_path):
    touch(tmp_path / "data.zip")
    assert "this is a file" in error("market1501", tmp_path / "data.zip")
    with pytest.raises(ConfigError, match=r"data\.kind"):
        read_catalog("market", tmp_path)


def test_an_unreadable_name_is_named(tmp_path):
    root = small_market(tmp_path)
    touch(root / "query" / "holiday.jpg")
    assert str(root / "query" / "holiday.jpg") in error("market1501", root)


def test_an_identity_in_train_and_test_is_named(tmp_path):
    root = small_market(tmp_path)
    touch(root / "bounding_box_test" / "0007_c3s1_000001_01.jpg")
    message = error("market1501", root)
    assert "identity 7 is in train and in query/gallery" in message
    assert str(root / "bounding_box_test" / "0007_c3s1_000001_01.jpg") in message


def test_a_query_can_not_be_a_distractor(tmp_path):
    root = small_market(tmp_path)
    touch(root / "query" / "0000_c1s1_000151_00.jpg")
    assert "pid 0" in error("market1501", root)


def test_occluded_duke_and_cuhk03(tmp_path):
    duke = market(
        tmp_path / "duke", ["0001_c2_f0046302.jpg", "0001_c12_f1.jpg"], ["0002_c1_f1.jpg"], ["0002_c8_f1.jpg"]
    )
    assert read_catalog("occluded-duke", duke).counts() == {
        "train": (1, 2, 2),
        "query": (1, 1, 1),
        "gallery": (1, 1, 1),
    }
    market(tmp_path / "cuhk" / "detected", ["0001_c1_1.png"], ["0002_c1_1.png"], ["0002_c2_2.png"])
    market(tmp_path / "cuhk" / "labeled", ["0001_c1_1.png"], ["0002_c1_1.png"], ["0002_c2_2.png"])
    message = error("cuhk03-np", tmp_path / "cuhk")
    assert "detected and labeled" in message
    assert read_catalog("cuhk03-np", tmp_path / "cuhk" / "detected").counts()["train"] == (1, 1, 1)


def msmt17(root, folders=("train", "test")):
    lists = {
        "train": [("0000/0000_000_01_0303morning_0015_0.jpg", 0), ("0000/0000_001_15_0303noon_0015_0.jpg", 0)],
        "val": [("0001/0001_000_02_0303morning_0015_0.jpg", 1)],
        "query": [("0000/0000_000_01_0303morning_0015_0.jpg", 0)],
        "gallery": [("0000/0000_001_14_0303morning_0015_0.jpg", 0)],
    }
    for part, lines in lists.items():
        folder = folders[part in ("query", "gallery")]
        touch(*(root / folder / name for name, _ in lines))
        (root / f"list_{part}.txt").write_text("".join(f"{name} {pid}\n" for name, pid in lines))
    return root


@pytest.mark.parametrize(("version", "folders"), [("V1", ("train", "test")), ("V2", ("mask_train_v2", "mask_test_v2"))])
def test_msmt17(tmp_path, version, folders):
    catalog = read_catalog("msmt17", msmt17(tmp_path, folders))
    # Person 0 of the test lists is not person 0 of the training lists.
    assert [(r.split, r.pid, r.camid) for r in catalog.records] == [
        ("train", 0, 1), ("train", 0, 15), ("train", 1, 2), ("query", 10000, 1), ("gallery", 10000, 14),
    ]  # fmt: skip
    assert catalog.notes[0] == f"MSMT17 {version}; the 1 images of list_val count into train, as is usual"
    assert all(r.path.is_file() for r in catalog.records)


@pytest.mark.parametrize(
    "line", ["0000/gone_0_1_0.jpg 0", "0000/0000_000.jpg 0", "x", "", "../list_val.txt 0", "/etc/passwd 3", "a.jpg b"]
)
def test_msmt17_a_bad_line_is_named(tmp_path, line):
    root = msmt17(tmp_path)
    touch(root / "test/0000/0000_000.jpg")
    with (root / "list_gallery.txt").open("a") as file:
        file.write(line + "\n")
    assert ("list_gallery.txt line 2" in error("msmt17", root)) != (line == "0000/0000_000.jpg 0")
    assert "list_gallery.txt line 2" in error("msmt17", root) or "0000_000.jpg" in error("msmt17", root)


def test_msmt17_a_missing_list_is_named(tmp_path):
    root = msmt17(tmp_path)
    (root / "list_val.txt").unlink()
    assert str(root / "list_val.txt") in error("msmt17", root)


def test_viper_is_halved_by_identity_and_always_alike(tmp_path):
    for number in range(10):
        touch(tmp_path / "cam_a" / f"{number:03d}_0.bmp", tmp_path / "cam_b" / f"{number:03d}_90.bmp")
    catalog = read_catalog("viper", tmp_path)
    assert catalog.counts() == {"train": (5, 10, 2), "query": (5, 5, 1), "gallery": (5, 5, 1)}
    assert {r.camid for r in catalog.records if r.split == "query"} == {1}
    assert {r.camid for r in catalog.records if r.split == "gallery"} == {2}
    assert {r.pid for r in catalog.records} == set(range(1, 11))
    assert "seed 0" in catalog.notes[0]
    assert read_catalog("viper", tmp_path) == catalog


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    root = small_market(tmp_path)

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)  # the tests may run as root, for whom chmod means nothing
    with pytest.raises(DataError, match="bounding_box_train: can't be read: Permission denied"):
        read_catalog("market1501", root)
