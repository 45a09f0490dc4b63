"""Shards: what was written is what is read, by us, by plain webdataset and by plain tarfile."""

import csv
import json
import os
import pickle
import tarfile
import threading
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from make_shards import part_of

from ppreid_dist.data.index import read_index
from ppreid_dist.data.shard_check import check_shards
from ppreid_dist.data.shard_writer import write_shards
from ppreid_dist.data.shards import ShardedSplit, join_splits
from ppreid_dist.errors import DataError


def _by_pixels(catalog, split):
    return {r.path.read_bytes(): r for r in catalog.records if r.split == split}


def test_every_picture_comes_back_with_its_labels(catalog, shards):
    for name in ("train", "query"):
        split, expected = ShardedSplit.open(shards, name), _by_pixels(catalog, name)
        assert len(split) == len(expected) == len(set(split.keys)) == 15
        for i in range(len(split)):
            record = expected.pop(split.image_bytes(i))
            assert (split.pids[i], split.camids[i]) == (record.pid, record.camid)
            assert split.mask_bytes(i) == record.mask.read_bytes()
            assert split.attributes["coat"][i] == dict(record.attributes)["coat"]
        assert not expected
        assert split.has_masks
        assert split.pids.dtype == split.camids.dtype == np.int64
    assert check_shards(shards, progress=False) == []


def test_plain_webdataset_reads_the_same(shards):
    split = ShardedSplit.open(shards, "train")
    rows = {key: i for i, key in enumerate(split.keys)}
    dataset = webdataset.WebDataset(sorted(map(str, shards.glob("train-*.tar"))), shardshuffle=False)
    seen = 0
    for sample in dataset:
        i = rows[sample["__key__"].rpartition("/")[2]]
        extension = next(e for e in ("jpg", "png", "bmp") if e in sample)
        assert sample[extension] == split.image_bytes(i)
        assert sample["mask.png"] == split.mask_bytes(i)
        about = json.loads(sample["json"])
        assert (about["pid"], about["camid"], about["split"]) == (split.pids[i], split.camids[i], "train")
        seen += 1
    assert seen == 15


def test_plain_tarfile_agrees_with_the_index(shards):
    with (shards / "train.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            with tarfile.open(shards / row["shard"]) as tar:
                member = next(m for m in tar if m.name.startswith(row["key"] + ".") and "mask" not in m.name)
                data = tar.extractfile(member).read()
            assert (member.offset_data, member.size) == (int(row["offset"]), int(row["size"]))
            assert zlib.crc32(data) == int(row["crc"])
            assert "." not in row["key"]  # webdataset would cut it there
            assert " " not in row["key"]


def test_a_part_and_a_join(shards, catalog):
    train, query = ShardedSplit.open(shards, "train"), ShardedSplit.open(shards, "query")
    part = part_of(train, np.array([4, 0, 9]))
    assert part.keys == [train.keys[i] for i in (4, 0, 9)]
    assert [part.image_bytes(k) for k in range(3)] == [train.image_bytes(i) for i in (4, 0, 9)]
    assert np.array_equal(part_of(train, train.pids == 3).pids, [3, 3, 3])
    both = join_splits([train, query])
    assert both.name == "train+query"
    assert both.keys == train.keys + query.keys
    assert both.attributes["coat"] == train.attributes["coat"] + query.attributes["coat"]
    assert [both.image_bytes(i) for i in range(30)] == [s.image_bytes(i) for s in (train, query) for i in range(15)]
    assert len({train.fingerprint, query.fingerprint, part.fingerprint, both.fingerprint}) == 4
    assert train.fingerprint == ShardedSplit.open(shards, "train").fingerprint


def test_splits_of_different_folders_must_not_share_people(shards, catalog, tmp_path):
    write_shards(catalog, tmp_path / "copy", progress=False)
    with pytest.raises(DataError, match="both have a person 3"):
        join_splits([ShardedSplit.open(shards, "train"), ShardedSplit.open(tmp_path / "copy", "train")])


def test_splits_without_masks_and_attributes(catalog, tmp_path):
    records = [replace(r, mask=None, attributes=() if i % 2 else r.attributes) for i, r in enumerate(catalog.records)]
    write_shards(replace(catalog, records=tuple(records)), tmp_path / "bare", progress=False)
    split = ShardedSplit.open(tmp_path / "bare", "train")
    assert not split.has_masks
    assert split.mask_bytes(0) is None
    assert set(split.attributes["coat"]) == {"red", "blue, long", ""}


def test_an_attribute_may_be_any_text(catalog, tmp_path):
    texts, name = ["\r", "a\rb", "a\nb", "\r\n", 'a "b", c', " ", "\0", "ü\u2028"], "coat\rlong"
    told = [replace(r, attributes=((name, texts[i % len(texts)]),)) for i, r in enumerate(catalog.records)]
    various = replace(catalog, records=tuple(told))
    write_shards(various, tmp_path / "any", progress=False)
    split, expected = ShardedSplit.open(tmp_path / "any", "train"), _by_pixels(various, "train")
    for i, text in enumerate(split.attributes[name]):
        assert text == dict(expected[split.image_bytes(i)].attributes)[name]
    assert set(texts) == set(split.attributes[name])
    assert check_shards(tmp_path / "any", progress=False) == []


def test_threads_forks_and_pickles_read_alike(shards):
    split = ShardedSplit.open(shards, "train")
    expected = [ShardedSplit.open(shards, "train").image_bytes(i) for i in range(15)]
    wrong = []

    def read():
        for _ in range(20):
            wrong.extend(i for i in range(15) if split.image_bytes(i) != expected[i])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    copy = pickle.loads(pickle.dumps(split))
    assert [copy.image_bytes(i) for i in range(15)] == expected
    if (child := os.fork()) == 0:
        os._exit(0 if [split.image_bytes(i) for i in range(15)] == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [split.image_bytes(i) for i in range(15)] == expected


def test_a_large_index_is_read_in_seconds(tmp_path):
    rows, file = 100_000, tmp_path / "train.csv"
    with file.open("w") as stream:
        stream.write("key,shard,offset,size,crc,pid,camid,mask_offset,mask_size,mask_crc,attr:coat\n")
        stream.writelines(f"{i:06d}_x,train-000000.tar,{i},9,{i},{i % 99},1,0,0,0,red\n" for i in range(rows))
    began = time.process_time()
    index = read_index(file, ["train-000000.tar"])
    assert time.process_time() - began < 5  # 0.4 s, beside much other work 1 s
    assert len(index) == rows
    assert index.key(7) == "000007_x"
