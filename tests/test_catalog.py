import csv
import os
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppreid_dist.data.catalog import KINDS, Catalog, hold_out, read_catalog
from ppreid_dist.data.layouts import parse_name
from ppreid_dist.data.records import SPLITS, Record
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


def small_csv(root, rows, columns=("path", "pid", "camid", "split")):
    root.mkdir(parents=True, exist_ok=True)
    with (root / "index.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return root


ROWS = [["a.jpg", 1, 1, "train"], ["b.jpg", 2, 1, "query"], ["c.jpg", 2, 2, "gallery"]]


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


# --- layouts


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


# --- CSV


def test_csv_with_masks_and_attributes_as_folder_or_file(tmp_path):
    touch(*(tmp_path / n for n in ("a.jpg", "b.jpg", "c.jpg", "u.jpg", "x.jpg", "m/a.png")))
    rows = [
        ["c.jpg", "red", 2, 2, "gallery", "", "no"],
        ["a.jpg", "blue, dark", 1, 1, "train", "m/a.png", "yes"],
        ["b.jpg", "", 2, 1, "query", "", "no"],
        ["x.jpg", "", -1, 1, "gallery", "", "no"],
        ["u.jpg", "", 9, 1, "unlabelled", "", "no"],
    ]
    small_csv(tmp_path, rows, ("path", "upper", "pid", "camid", "split", "mask", "bag"))
    catalog = read_catalog("csv", tmp_path)
    assert catalog.records[0] == Record(
        path=tmp_path / "a.jpg", pid=1, camid=1, split="train", mask=tmp_path / "m/a.png",
        attributes=(("upper", "blue, dark"), ("bag", "yes")),
    )  # fmt: skip
    assert [r.mask for r in catalog.records[1:]] == [None, None, None]
    assert [r.split for r in catalog.records] == ["train", "unlabelled", "query", "gallery"]
    assert read_catalog("csv", tmp_path / "index.csv").records == catalog.records


def test_csv_names_of_identities_and_the_short_word_test(tmp_path):
    rows = [
        ["a.jpg", "bus", 2, "train"], ["b.jpg", "bus", 1, "train"], ["q.jpg", "car", 3, "test"],
        ["r.jpg", "car", 3, "test"], ["g.jpg", "car", 7, "test"], ["h.jpg", "car", 5, "test"],
    ]  # fmt: skip
    touch(*(tmp_path / row[0] for row in rows))
    small_csv(tmp_path, rows)
    catalog = read_catalog("csv", tmp_path)
    assert {(r.path.name, r.pid, r.split) for r in catalog.records} == {
        ("a.jpg", 1, "train"), ("b.jpg", 1, "train"), ("q.jpg", 2, "query"), ("r.jpg", 2, "query"),
        ("g.jpg", 2, "gallery"), ("h.jpg", 2, "gallery"),
    }  # fmt: skip
    assert "numbered 1 to 2" in catalog.notes[0] and "first camera are query" in catalog.notes[1]


BAD = {
    "pid": ["x", 1, "gallery"], "float": ["1.5", 1, "gallery"],
    "no pid": ["", 1, "gallery"], "low": ["-2", 1, "gallery"],
    "camid": [2, "c1", "gallery"], "negative camera": [2, -1, "gallery"], "split": [2, 1, "probe"],
    "short": [2, 1], "long": [2, 1, "gallery", "more"], "unicode digit": ["٣", 1, "gallery"],
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_csv_a_bad_field_names_its_line(tmp_path, bad):
    touch(*(tmp_path / n for n in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")))
    small_csv(tmp_path, [*ROWS, ["d.jpg", *BAD[bad]]])
    assert f"{tmp_path / 'index.csv'} line 5" in error("csv", tmp_path)


def test_csv_bad_paths_name_their_line(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "secret.jpg"
    touch(outside, *(root / n for n in ("a.jpg", "b.jpg", "c.jpg", "sub/d.jpg")))
    os.symlink(outside, root / "link.jpg")
    os.symlink(tmp_path, root / "up")
    os.symlink(root / "loop.jpg", root / "loop.jpg")
    os.symlink(root / "a.jpg", root / "inner.jpg")
    bad = [
        "",
        str(outside),
        "../secret.jpg",
        "sub/../a.jpg",
        "link.jpg",
        "up/secret.jpg",
        "loop.jpg",
        "gone.jpg",
        "sub",
    ]
    for name in [*bad, "nul\0.jpg", "two\nlines.jpg", "long" * 999, "a.jpg"]:
        small_csv(root, [*ROWS, [name, 2, 3, "gallery"]])
        assert f"{root / 'index.csv'} line " in error("csv", root), name
        small_csv(root, [[*row, ""] for row in ROWS[:2]] + [["c.jpg", 2, 2, "gallery", name]], (*COLUMNS, "mask"))
        if name not in ("", "a.jpg"):
            assert f"{root / 'index.csv'} line " in error("csv", root), name
    small_csv(root, [*ROWS, ["inner.jpg", 2, 3, "gallery"]])
    assert read_catalog("csv", root).counts()["gallery"] == (1, 2, 2)


COLUMNS = ("path", "pid", "camid", "split")


@pytest.mark.parametrize("missing", COLUMNS)
def test_csv_a_missing_column_is_named(tmp_path, missing):
    small_csv(tmp_path, [["a"] * 3], [c for c in COLUMNS if c != missing])
    message = error("csv", tmp_path)
    assert f"no column {missing}" in message
    assert "index.csv" in message


@pytest.mark.parametrize(
    "content", [b"", b"path,pid,camid,split\n", b"\xff\xfe\x00", b'path,pid,camid,split\n"a', b"\x00"]
)
def test_csv_empty_or_damaged(tmp_path, content):
    (tmp_path / "index.csv").write_bytes(content)
    assert "index.csv" in error("csv", tmp_path)


def test_csv_columns_must_be_named_once(tmp_path):
    for extra in ("", "pid"):
        small_csv(tmp_path, [], (*COLUMNS, extra))
        assert "twice" in error("csv", tmp_path)


@pytest.mark.parametrize("dropped", range(3))
def test_csv_needs_train_query_and_gallery(tmp_path, dropped):
    touch(*(tmp_path / n for n in ("a.jpg", "b.jpg", "c.jpg")))
    small_csv(tmp_path, [row for i, row in enumerate(ROWS) if i != dropped])
    assert f"the {ROWS[dropped][3]} split has no picture" in error("csv", tmp_path)


@pytest.mark.parametrize(
    ("pid", "split"), [(1, "aux"), (2, "aux"), (1, "unlabelled"), (2, "unlabelled"), (2, "train"), (1, "gallery")]
)
def test_csv_groups_of_people_are_disjoint(tmp_path, pid, split):
    touch(*(tmp_path / n for n in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")))
    small_csv(tmp_path, [*ROWS, ["d.jpg", pid, 1, split]])
    assert f"identity {pid} is in " in error("csv", tmp_path)


FIELD = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 20), st.sampled_from(SPLITS), FIELD), max_size=12))
def test_csv_round_trip_of_any_rows(tmp_path_factory, people):
    root = tmp_path_factory.mktemp("csv")
    # The split decides the hundreds of the pid, so the groups of people are disjoint.
    base = {"train": 100, "unlabelled": 200, "aux": 300, "query": 400, "gallery": 400}
    people = [*people, (1, 1, "train", ""), (1, 1, "query", ""), (1, 2, "gallery", "")]
    rows = [[f"{i}.jpg", base[s] + pid, camid, s, text] for i, (pid, camid, s, text) in enumerate(people)]
    touch(*(root / row[0] for row in rows))
    small_csv(root, rows, (*COLUMNS, "a text"))
    found = {(r.path.name, r.pid, r.camid, r.split, r.attributes[0][1]) for r in read_catalog("csv", root).records}
    assert found == {tuple(row) for row in rows}


@given(st.binary(max_size=60))
def test_any_bytes_as_csv_end_in_one_line(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("csv")
    (root / "index.csv").write_bytes(b"path,pid,camid,split\n" + content)
    error("csv", root)


# --- the catalogue


def made(kind, **splits):
    """A catalogue with split=(identities, images) in each split, without files."""
    start, records = 1, []
    for split, (identities, images) in splits.items():
        first = 5000 if split in ("query", "gallery") else start
        for i in range(images):
            records.append(Record(path=f"{split}{i}", pid=first + i % identities, camid=i % 6, split=split))
        start += identities
    return Catalog(kind=kind, root="/data", records=tuple(records), notes=("a note",))


def test_table_says_as_published_or_differs():
    table = made("market1501", train=(751, 12936), query=(750, 3368), gallery=(750, 15912)).table().splitlines()
    assert table[0] == "Market-1501 at /data"
    assert table[2].split()[:4] == ["train", "751", "12936", "6"]
    assert table[2].endswith("as published")
    assert table[3].endswith("as published")
    assert table[4].endswith("differs from 750 / 15913 published")
    assert table[5] == "note: a note"


def test_table_compares_with_the_nearer_version_of_cuhk03():
    labelled = made("cuhk03-np", train=(767, 7368), query=(700, 1400), gallery=(700, 5328))
    assert "CUHK03-NP labelled" in labelled.table()
    assert "differs" not in labelled.table()


def test_table_of_a_csv_has_nothing_to_compare_with():
    assert "publ" not in made("csv", train=(2, 4), query=(1, 1), gallery=(1, 1)).table()


def test_hold_out_moves_people_and_only_people_of_train():
    catalog = made("market1501", train=(751, 12936), query=(750, 3368), gallery=(750, 15913))
    held = hold_out(catalog, 100, 3)
    assert held.counts()["train"][0] == 651
    assert held.counts()["aux"][0] == 100
    assert not {r.pid for r in held.records if r.split == "aux"} & {r.pid for r in held.records if r.split == "train"}
    assert {(r.path, r.pid) for r in held.records} == {(r.path, r.pid) for r in catalog.records}
    assert "as published (train and aux together)" in held.table()
    assert "100 train identities held out" in held.notes[-1]
    assert hold_out(catalog, 100, 3) == held
    assert hold_out(catalog, 100, 4).records != held.records
    assert hold_out(catalog, 0, 3) == catalog


def test_hold_out_depends_on_the_set_of_pids_only():
    catalog = made("csv", train=(20, 60), query=(2, 2), gallery=(2, 4))
    fewer = Catalog(kind="csv", root=catalog.root, records=catalog.records[40:], notes=())
    aux = [{r.pid for r in hold_out(c, 7, 0).records if r.split == "aux"} for c in (catalog, fewer)]
    assert aux[0] == aux[1]
    order = np.argsort([SPLITS.index(r.split) for r in hold_out(catalog, 7, 0).records], kind="stable")
    assert order.tolist() == list(range(len(catalog.records)))


@pytest.mark.parametrize("identities", [-1, 19, 20, 21])
def test_hold_out_leaves_people_to_train_on(identities):
    with pytest.raises(ConfigError, match=r"data\.aux_identities"):
        hold_out(made("csv", train=(20, 60), query=(2, 2), gallery=(2, 4)), identities, 0)


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    root = small_market(tmp_path)

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)  # the tests may run as root, for whom chmod means nothing
    with pytest.raises(DataError, match="bounding_box_train: can't be read: Permission denied"):
        read_catalog("market1501", root)
