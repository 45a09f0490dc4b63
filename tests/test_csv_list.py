"""A CSV of pictures to records: any rows that are right, one line for those that aren't."""

import csv
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import error, touch

from ppreid_dist.data.catalog import read_catalog
from ppreid_dist.data.records import SPLITS, Record

COLUMNS = ("path", "pid", "camid", "split")
ROWS = [["a.jpg", 1, 1, "train"], ["b.jpg", 2, 1, "query"], ["c.jpg", 2, 2, "gallery"]]


def small_csv(root, rows, columns=COLUMNS):
    root.mkdir(parents=True, exist_ok=True)
    with (root / "index.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return root


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


def test_csv_blanks_around_words_mean_nothing(tmp_path):
    touch(*(tmp_path / n for n in ("a.jpg", "b.jpg", "c.jpg")))
    rows = [",".join([str(row[0]), *(f" {value} " for value in row[1:])]) for row in ROWS]
    (tmp_path / "index.csv").write_text("path, pid, camid, split\n" + "\n".join(rows) + "\n   \n\n")
    assert read_catalog("csv", tmp_path).counts() == {"train": (1, 1, 1), "query": (1, 1, 1), "gallery": (1, 1, 1)}


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
