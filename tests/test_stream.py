"""From shards to batches: every placement gives pictures with their own labels; the planned ones exactly the plan's."""

import itertools
import os
import re
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_shards import make_catalog, part_of

from ppreid_dist import distributed
from ppreid_dist.data.decode import Decoder
from ppreid_dist.data.plan import PKPlan, StrangersPlan
from ppreid_dist.data.shard_writer import write_shards
from ppreid_dist.data.shards import ShardedSplit, join_splits
from ppreid_dist.data.stream import (
    StreamConfig,
    WebDatasetSource,
    choose_placement,
    load_pictures,
    open_source,
    open_stream,
)
from ppreid_dist.data.tolerant import Tolerant
from ppreid_dist.errors import ConfigError, DataError

SIZE, CPU = (32, 16), torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("stream")
    write_shards(make_catalog(base / "raw", people=8, shots=4), base / "shards", images_per_shard=8, progress=False)
    return base / "shards"


@pytest.fixture(scope="module")
def split(folder):
    return ShardedSplit.open(folder, "train")


@pytest.fixture(scope="module")
def pictures(split):
    return load_pictures(split, SIZE, backend="pillow", device=CPU, progress=False)


def _open(split, plan, placement, start_step=0, rows=None, **options):
    config = StreamConfig(backend="pillow", placement=placement, **options)
    source = open_source(split, config=config, size=SIZE, device=CPU)
    rows = rows or slice(0, plan.total)
    return open_stream(
        split, plan, source=source, prefetch=config.prefetch, device=CPU, start_step=start_step, rank_rows=rows
    )


def test_a_whole_split_is_loaded_in_its_order(split, pictures):
    decoder = Decoder("pillow", SIZE, CPU)
    for i in range(len(split)):
        assert torch.equal(pictures.images_N3HW[i], decoder.decode([split.image_bytes(i)], ["x"])[0])
    assert pictures.keys == split.keys
    assert np.array_equal(pictures.pids_N, split.pids)
    assert pictures.attributes == split.attributes
    for pid, mask in zip(split.pids, pictures.masks_N1HW, strict=True):
        assert mask[0, 0].sum() == 4 + (pid - 3) // 7  # as the person was drawn
    query = load_pictures(part_of(split, np.arange(3)), SIZE, backend="pillow", device=CPU, progress=False)
    assert torch.equal(query.images_N3HW, pictures.images_N3HW[:3])


@pytest.mark.parametrize("placement", ["resident", "indexed"])
def test_planned_batches_are_the_plans(split, pictures, placement):
    plan = PKPlan(split.pids, 4, 2, seed=1)
    with _open(split, plan, placement) as stream:
        for step, batch in enumerate(itertools.islice(stream, 6)):
            rows = plan.batch(step)
            assert batch.step == step
            assert torch.equal(batch.images, pictures.images_N3HW[rows])
            assert batch.labels.tolist() == [sorted(set(split.pids)).index(pid) for pid in split.pids[rows]]
            assert batch.camids.tolist() == split.camids[rows].tolist()


@pytest.mark.parametrize("placement", ["resident", "indexed"])
def test_resuming_and_ranks_change_nothing(split, placement):
    plan = PKPlan(split.pids, 4, 2, seed=1)
    with _open(split, plan, placement) as stream:
        unbroken = list(itertools.islice(stream, 7))
    with _open(split, plan, placement, start_step=5) as stream:
        for batch in itertools.islice(stream, 2):
            assert torch.equal(batch.images, unbroken[batch.step].images)
    parts = []
    for rank in range(4):
        with _open(split, plan, placement, start_step=3, rows=slice(2 * rank, 2 * rank + 2)) as stream:
            parts.append(next(stream))
    assert torch.equal(torch.cat([part.images for part in parts]), unbroken[3].images)
    assert torch.equal(torch.cat([part.labels for part in parts]), unbroken[3].labels)


def test_strangers_stream_too(split, pictures):
    plan = StrangersPlan(split.pids, 6, seed=0)
    with _open(split, plan, "indexed") as stream:
        assert torch.equal(next(stream).images, pictures.images_N3HW[plan.batch(0)])


def test_joined_splits_stream(folder, split):
    both = join_splits([split, ShardedSplit.open(folder, "query")])
    for placement in ("indexed", "webdataset"):
        with _open(both, PKPlan(both.pids, 16, 2, seed=0), placement) as stream:
            assert sorted(next(stream).labels.tolist()) == sorted(2 * list(range(16)))


@pytest.mark.parametrize("rows", [slice(0, 3), slice(0, 1), slice(0, 6), slice(0, 0)])
def test_processes_must_share_a_batch_by_whole_people(split, rows):
    with pytest.raises(ConfigError, match=r"^data\.identities_per_batch: 4 don't divide"):
        _open(split, PKPlan(split.pids, 4, 2, seed=1), "indexed", rows=rows)


def test_auto_placement_follows_the_size_and_says_so(caplog):
    caplog.set_level("INFO")
    config = StreamConfig(resident_limit_gb=1.0)
    assert choose_placement(config, 10_000, (256, 128)) == "resident"  # 0.98 GB
    assert choose_placement(config, 11_000, (256, 128)) == "indexed"  # 1.08 GB
    assert len(caplog.records) == 2
    assert choose_placement(StreamConfig(placement="resident"), 10**9, (256, 128)) == "resident"


def _flip_a_byte(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.faults
def test_damage_reaches_the_trainer_as_one_line(tmp_path):
    write_shards(make_catalog(tmp_path / "raw"), tmp_path / "shards", progress=False)
    split = ShardedSplit.open(tmp_path / "shards", "train")
    _flip_a_byte(tmp_path / "shards/train-000000.tar", int(split.index.table_N["offset"][2]) + 9)
    with (
        _open(split, PKPlan(split.pids, 5, 3, seed=0), "indexed") as stream,
        pytest.raises(DataError, match=rf"train-000000\.tar: {split.keys[2]}: damaged"),
    ):
        next(stream)
    with pytest.raises(DataError, match=split.keys[2]):
        _open(split, PKPlan(split.pids, 5, 3, seed=0), "resident")


# ---- webdataset


def _source(split, **options):
    return WebDatasetSource(split.urls, Decoder("pillow", SIZE, CPU), **options)


def test_streamed_batches_hold_distinct_people_with_their_own_pictures(split, pictures):
    looks = {tuple(image.flatten().tolist()): i for i, image in enumerate(pictures.images_N3HW)}
    met = set()
    for images, pids, camids in itertools.islice(_source(split, pool=16).batches(3, 2, seed=0), 40):
        rows = [looks[tuple(image.flatten().tolist())] for image in images]
        assert split.pids[rows].tolist() == pids.tolist()
        assert split.camids[rows].tolist() == camids.tolist()
        assert (pids.reshape(3, 2)[:, 0] == pids.reshape(3, 2)[:, 1]).all()
        assert len(set(pids)) == 3
        met |= set(rows)
    assert len(met) == len(split)


def test_streamed_order_is_seeded(split):
    def pids(seed):
        return [b[1].tolist() for b in itertools.islice(_source(split, pool=16).batches(3, 2, seed=seed), 5)]

    assert pids(0) == pids(0) != pids(1)


def test_labelled_pictures_and_strangers_come_in_orders_of_their_own(split):
    """…from the same shards, by the same seed; and each in the same order again."""
    labelled, strangers = PKPlan(split.pids, 2, 2, seed=0), StrangersPlan(split.pids, 4, seed=0)
    asked = []

    class Seen(WebDatasetSource):
        def batches(self, P, K, *, seed):
            asked.append(seed)
            return super().batches(P, K, seed=seed)

    for plan in (labelled, strangers, labelled, StrangersPlan(split.pids, 4, seed=0, key="reversal.batch")):
        source = Seen(split.urls, Decoder("pillow", SIZE, CPU))
        rows = slice(0, plan.total)
        with open_stream(split, plan, source=source, prefetch=1, device=CPU, start_step=0, rank_rows=rows) as stream:
            next(stream)
    assert asked[0] == asked[2] and len(set(asked)) == 3


def test_streaming_keeps_to_a_selection_and_repeats_where_pictures_are_few(split):
    few = part_of(split, np.flatnonzero(np.isin(split.pids, split.pids[:3]))[:7])
    plan = PKPlan(few.pids, len(set(few.pids)), 4, seed=0)
    with _open(few, plan, "webdataset") as stream:
        for batch in itertools.islice(stream, 10):
            assert sorted(batch.labels.tolist()) == sorted(4 * list(range(len(set(few.pids)))))


def test_streaming_processes_read_shards_of_their_own(split, monkeypatch):
    keys = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        keys.append({sample[0] for sample in itertools.islice(_source(split)._samples(0), 32)})
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == set(split.keys)


def test_a_pool_of_all_there_is_is_not_filled_by_a_pass_for_every_batch(split, monkeypatch):
    source, read = _source(split, pool=8192), []
    samples = source._samples
    monkeypatch.setattr(source, "_samples", lambda seed: (read.append(1) or sample for sample in samples(seed)))
    batches = source.batches(3, 2, seed=0)
    next(batches)
    assert len(read) > len(split)  # until all was met again
    before = len(read)
    for _ in range(30):
        next(batches)
    assert len(read) - before < 30 * 0.7 * len(split)


def test_all_processes_hear_of_one_that_would_be_dealt_too_few_people(split, monkeypatch):
    plan = PKPlan(split.pids, 8, 2, seed=0)
    assert len(np.unique(split.index.table_N["shard"])) == 4
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    first = np.isin(split.index.table_N["shard"], [0, 2])
    few = part_of(split, np.flatnonzero(first | (split.pids == split.pids[~first][0])))
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows = slice(8 * rank, 8 * rank + 8)
        message = r"^data\.images_per_shard: process 1 of 2 would read shards with 1 people, and a batch has 4 of "
        with pytest.raises(ConfigError, match=message):
            open_stream(few, plan, source=_source(few), prefetch=2, device=CPU, start_step=0, rank_rows=rows)


def test_streaming_from_far_away_needs_only_the_index_here(folder, tmp_path, split):
    here = tmp_path / "index"
    here.mkdir()
    for name in ("meta.json", "train.csv"):
        (here / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(DataError, match="missing"):
        ShardedSplit.open(here, "train")
    far = ShardedSplit.open(here, "train", remote=f"pipe:cat {folder}/")
    assert far.fingerprint == split.fingerprint
    with _open(far, PKPlan(far.pids, 4, 2, seed=0), "webdataset", start_step=9) as stream:
        batch = next(stream)
    assert batch.step == 9
    assert batch.images.shape == (8, 3, *SIZE)


def test_streaming_fails_in_one_line(split, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="holds 8 people, 9 are needed"):
        next(_source(split).batches(9, 2, seed=0))
    with pytest.raises(DataError, match="streaming failed"):
        next(WebDatasetSource([str(tmp_path / "no.tar")], Decoder("pillow", SIZE, CPU)).batches(2, 2, seed=0))
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    with pytest.raises(ConfigError, match="a shard for each of 5 processes, but there are 4"):
        _source(split)


def _overwrite(shard, ending, data):
    """The content of the shard's second member of that ending."""
    with tarfile.open(shard) as tar:
        member = [member for member in tar if member.name.endswith(ending)][1]
    with shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(data.ljust(member.size))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: _overwrite(shard, ".json", b"\0\0\0\xff"), "{}: KEY: streaming failed: 'utf-32-be' codec"),
        (lambda shard: _overwrite(shard, ".json", b"[]"), "{}: KEY: streaming failed: list indices"),
        (lambda shard: _overwrite(shard, ".jpg", b""), "{}: KEY: can't be decoded by pillow: cannot identify"),
        (
            lambda shard: shard.write_bytes(shard.read_bytes().replace(b".json", b".none")),
            "{}: KEY: streaming failed: a sample lacks its json",
        ),
        (lambda shard: os.truncate(shard, 1024), "{}: streaming failed: unexpected end of data"),
        (lambda shard: os.truncate(shard, 0), "{}: streaming failed: empty file"),
        (lambda shard: shard.write_bytes(9999 * b"x"), "{}: streaming failed: invalid header"),
        (lambda shard: shard.unlink(), "{}: streaming failed: No such file or directory"),
    ],
)
def test_a_damaged_shard_is_named(folder, tmp_path, damage, message):
    shutil.copytree(folder, tmp_path / "shards")
    broken, shard = ShardedSplit.open(tmp_path / "shards", "train"), tmp_path / "shards" / "train-000002.tar"
    damage(shard)
    batches = _source(broken).batches(4, 2, seed=0)
    with pytest.raises(DataError) as caught:
        for _ in range(99):
            next(batches)
    assert re.sub(r"\d+_train_p\d_\d", "KEY", str(caught.value)).startswith(message.format(shard))
    assert " object at 0x" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize("placement", ["resident", "indexed"])
def test_a_few_damaged_pictures_are_named_and_replaced_by_the_same_person(tmp_path, caplog, placement):
    write_shards(make_catalog(tmp_path / "raw"), tmp_path / "shards", progress=False)
    split = ShardedSplit.open(tmp_path / "shards", "train")
    whole = load_pictures(split, SIZE, backend="pillow", device=CPU, progress=False).images_N3HW
    people = np.unique(split.pids)
    bad = [int(np.flatnonzero(split.pids == pid)[-1]) for pid in people[:2]]
    for row in bad:
        _flip_a_byte(tmp_path / "shards/train-000000.tar", int(split.index.table_N["offset"][row]) + 9)
    plan = PKPlan(split.pids, 5, 3, seed=0)
    stands_in = np.arange(len(split))
    stands_in[bad] = [int(np.flatnonzero(split.pids == pid)[0]) for pid in people[:2]]  # the next, round the end
    with _open(split, plan, placement, damaged=2) as stream:
        for batch in itertools.islice(stream, 4):
            assert torch.equal(batch.images, whole[stands_in[plan.batch(batch.step)]])
    named = [record.message for record in caplog.records if "replaced" in record.message]
    assert len(named) == 2
    assert all(any(split.keys[row] in line for line in named) for row in bad)
    with (
        pytest.raises(DataError, match=r"damaged pictures: 2; data\.stream\.damaged allows 1"),
        _open(split, plan, placement, damaged=1) as stream,
    ):
        list(itertools.islice(stream, 4))


def test_two_feeds_that_meet_a_damaged_picture_at_once_both_go_on():
    """Each has a thread; here both have met it before either looks which it is."""
    met = threading.Barrier(2)

    class Met:
        pids, index = np.array([1, 1, 2, 2]), SimpleNamespace(key=str)

        def image_bytes(self, row):
            return row

        def decode(self, rows, keys):
            if 0 not in rows:
                return torch.tensor(rows)
            if len(rows) > 1:
                met.wait(timeout=10)
            raise DataError("0: damaged")

    tolerant = Tolerant(Met(), Met(), 1)
    with ThreadPoolExecutor(2) as threads:
        found = [thread.result() for thread in [threads.submit(tolerant.decode, rows) for rows in ([0, 2], [0, 3])]]
    assert [of.tolist() for of in found] == [[1, 2], [1, 3]]


@pytest.mark.faults
def test_a_person_without_a_whole_picture_ends_it(tmp_path):
    write_shards(make_catalog(tmp_path / "raw"), tmp_path / "shards", progress=False)
    split = ShardedSplit.open(tmp_path / "shards", "train")
    for row in np.flatnonzero(split.pids == split.pids[0]):
        _flip_a_byte(tmp_path / "shards/train-000000.tar", int(split.index.table_N["offset"][row]) + 9)
    with pytest.raises(DataError, match="as are all pictures of this person"):
        _open(split, PKPlan(split.pids, 5, 3, seed=0), "resident", damaged=100)
