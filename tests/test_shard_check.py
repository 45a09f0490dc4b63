"""Damaged shards: every kind is named, where they are read and where they are checked."""

import csv
import io
import json
import tarfile

import pytest

from ppreid_dist.data.shard_check import check_shards
from ppreid_dist.data.shards import ShardedSplit
from ppreid_dist.errors import DataError


def _flip_a_byte(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 0xFF
    file.write_bytes(data)


def test_a_changed_byte_is_found_when_read_and_when_checked(shards):
    split = ShardedSplit.open(shards, "train")
    row = split.index.table_N[4]
    shard = shards / split.index.shards[row["shard"]]
    _flip_a_byte(shard, int(row["offset"]) + 40)
    split = ShardedSplit.open(shards, "train")
    with pytest.raises(DataError, match=f"{shard}: {split.keys[4]}: damaged"):
        split.image_bytes(4)
    assert split.image_bytes(5)
    (problem,) = check_shards(shards, progress=False)
    assert problem.startswith(f"{shard}: {split.keys[4]}.")


@pytest.mark.parametrize("keep", [0, 700, 9000])
def test_a_truncated_tar_is_found_when_opened_and_when_checked(shards, keep):
    tar = shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{tar}: has {keep} bytes"):
        ShardedSplit.open(shards, "train")
    problems = check_shards(shards, progress=False)
    assert any("samples of the index are not whole" in p for p in problems)
    assert all(p.startswith(str(tar)) for p in problems)
    assert ShardedSplit.open(shards, "query")  # another split isn't hurt


def test_missing_and_surplus_files_are_named(shards):
    (shards / "train-000002.tar").unlink()
    (shards / "train-000009.tar").write_bytes(b"")
    assert check_shards(shards, progress=False) == [
        f"{shards / 'train-000002.tar'}: missing",
        f"{shards / 'train-000009.tar'}: not in meta.json",
    ]
    with pytest.raises(DataError, match=r"train-000002\.tar: missing"):
        ShardedSplit.open(shards, "train")
    (shards / "query.csv").unlink()
    with pytest.raises(DataError, match=r"query\.csv: no such index"):
        ShardedSplit.open(shards, "query")
    assert any("query.csv: no such index" in p for p in check_shards(shards, progress=False))


def test_missing_folders_and_splits_are_named(shards, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        ShardedSplit.open(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="no split 'gallery', only train, query"):
        ShardedSplit.open(shards, "gallery")
    assert len(check_shards(tmp_path / "nowhere")) == 1


def _edit_index(shards, edit):
    file = shards / "train.csv"
    with file.open(newline="") as stream:
        rows = list(csv.reader(stream))
    edit(rows)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.pop(), "doesn't match meta.json"),
        (lambda rows: rows[3].__setitem__(5, "999"), "doesn't match meta.json"),
        (lambda rows: rows[3].__setitem__(2, "99999999"), "lies outside of its shard"),
        (lambda rows: rows[3].__setitem__(2, "-5"), "lies outside of its shard"),
        (lambda rows: rows[3].__setitem__(2, "many"), "damaged index"),
        (lambda rows: rows[3].__setitem__(2, "9" * 30), "damaged index"),
        (lambda rows: rows[3].pop(), "damaged index"),
        (lambda rows: rows[3].__setitem__(1, "../train-000000.tar"), "which meta.json doesn't have"),
        (lambda rows: rows[0].__setitem__(0, "name"), "not an index of shards"),
        (lambda rows: rows.clear(), "not an index of shards"),
    ],
)
def test_an_index_that_does_not_match_is_refused(shards, edit, message):
    _edit_index(shards, edit)
    with pytest.raises(DataError, match=f"train.csv: .*{message}"):
        ShardedSplit.open(shards, "train")
    assert any("train.csv" in problem for problem in check_shards(shards, progress=False))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 99, "splits": {}}',
        b'{"format": 1, "splits": {"train": {}}}',
        b'{"format": 1, "splits": {}, "settings": []}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_meta_is_named(shards, content):
    (shards / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.json"):
        ShardedSplit.open(shards, "train")
    (problem,) = check_shards(shards, progress=False)
    assert "meta.json" in problem


def test_a_meta_cannot_lead_out_of_the_folder(shards):
    meta = json.loads((shards / "meta.json").read_text())
    meta["splits"]["train"]["shards"]["../../etc/passwd"] = 1
    (shards / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="not the name of a shard"):
        ShardedSplit.open(shards, "train")


def _member(name, kind=tarfile.REGTYPE, data=b"x"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", len(data) if kind == tarfile.REGTYPE else 0
    return info, io.BytesIO(data)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (_member("../evil.jpg"), "'../evil.jpg' is no plain file"),
        (_member("/etc/evil.jpg"), "'/etc/evil.jpg' is no plain file"),
        (_member("000000_a.jpg", tarfile.SYMTYPE), "'000000_a.jpg' is no plain file"),
        (_member("000000_a.jpg", tarfile.LNKTYPE), "'000000_a.jpg' is no plain file"),
        (_member("evil.sh"), "'evil.sh' is no plain file"),
        (_member("stranger.jpg"), "stranger.jpg: not in the index"),
        (_member("stranger.json"), "stranger.json: unknown"),
    ],
)
def test_tricks_in_a_tar_are_named(shards, member, message):
    tar = shards / "train-000000.tar"
    with tarfile.open(tar, "a") as writer:
        writer.addfile(*member)
    problems = check_shards(shards, progress=False)
    assert any(problem.startswith(f"{tar}: {message}") for problem in problems)


def test_other_labels_in_the_tar_than_in_the_index_are_named(shards):
    tar = shards / "train-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"pid": 3,', b'"pid": 4,'))
    assert any("not the labels of the index" in problem for problem in check_shards(shards, progress=False))
