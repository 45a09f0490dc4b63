"""Writing shards: all of the folder or nothing, and a bad picture is named."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_shards import encode, make_catalog
from PIL import Image

from ppreid_dist.data import shard_writer
from ppreid_dist.data.shard_check import check_shards
from ppreid_dist.data.shard_writer import write_shards
from ppreid_dist.data.shards import ShardedSplit
from ppreid_dist.errors import DataError


def test_a_jpeg_with_a_second_picture_behind_it_is_a_jpeg(tmp_path):
    """MPO, as phones and stereo cameras write."""
    catalog = make_catalog(tmp_path / "raw")
    file = catalog.records[0].path
    file.write_bytes(encode(np.zeros((2, 32, 16, 3), np.uint8), "MPO"))
    write_shards(catalog, tmp_path / "shards", progress=False)
    names = []
    for tar in (tmp_path / "shards").glob("*.tar"):
        with tarfile.open(tar) as opened:
            names += opened.getnames()
    jpegs = sum(record.path.suffix == ".jpg" for record in catalog.records[1:])
    assert sum(name.endswith(".jpg") for name in names) == 1 + jpegs < len(catalog.records)
    assert check_shards(tmp_path / "shards", progress=False) == []


def test_two_writers_at_once_leave_one_folder(catalog, tmp_path, monkeypatch):
    """The other one was sooner; what it wrote is taken, if it is the same."""
    write, folder = shard_writer._write, tmp_path / "shards"

    def late(its, *rest):
        write(its, folder, *rest[1:])
        write(catalog, *rest)

    monkeypatch.setattr(shard_writer, "_write", late)
    write_shards(catalog, folder, images_per_shard=6, progress=False)
    assert (
        check_shards(folder, progress=False) == [] and [item.name for item in tmp_path.iterdir()].count("shards") == 1
    )
    assert not list(tmp_path.glob(".shards.*"))
    shutil.rmtree(folder)
    other = make_catalog(tmp_path / "other")

    def another_s(its, where, fingerprint, *rest):
        write(other, where, "another's", *rest)
        write(its, where, fingerprint, *rest)

    monkeypatch.setattr(shard_writer, "_write", another_s)
    with pytest.raises(DataError, match="shards: could not be written: Directory not empty"):
        write_shards(catalog, folder, images_per_shard=6, progress=False)


def test_pictures_are_shuffled_over_shards_by_the_seed(catalog, shards, tmp_path):
    pids = ShardedSplit.open(shards, "train").pids
    assert (np.diff(pids) == 0).sum() < 8  # 10 in identity blocks
    write_shards(catalog, tmp_path / "again", images_per_shard=6, progress=False)
    write_shards(catalog, tmp_path / "other", images_per_shard=6, seed=1, progress=False)
    assert (tmp_path / "again/train-000000.tar").read_bytes() == (shards / "train-000000.tar").read_bytes()
    assert not np.array_equal(ShardedSplit.open(tmp_path / "other", "train").pids, pids)


def test_a_finished_folder_is_reused_and_another_is_refused(catalog, shards):
    before = (shards / "meta.json").stat().st_mtime_ns
    write_shards(catalog, shards, images_per_shard=6, progress=False)
    assert (shards / "meta.json").stat().st_mtime_ns == before
    fewer = replace(catalog, records=catalog.records[1:])
    with pytest.raises(DataError, match=f"{shards}: holds other shards"):
        write_shards(fewer, shards, images_per_shard=6, progress=False)
    (shards / "meta.json").unlink()
    with pytest.raises(DataError, match=r"meta\.json"):
        write_shards(catalog, shards, images_per_shard=6, progress=False)


def _damage_source(catalog, content):
    victim = catalog.records[7].path
    victim.write_bytes(content if isinstance(content, bytes) else content(victim.read_bytes()))
    return victim


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        lambda data: data[: len(data) // 2],
        encode(np.zeros((8, 4), np.uint16), "PNG"),
        encode(np.zeros((8, 4, 3), np.uint8), "GIF"),
    ],
    ids=["empty", "text", "truncated", "16 bits", "gif"],
)
def test_a_bad_picture_stops_the_writing_with_its_name(catalog, tmp_path, content):
    victim = _damage_source(catalog, content)
    with pytest.raises(DataError) as caught:
        write_shards(catalog, tmp_path / "out" / "shards", progress=False)
    assert str(victim) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == []


def test_a_mask_of_another_size_is_refused(catalog, tmp_path):
    victim = catalog.records[7].mask
    victim.write_bytes(encode(np.zeros((5, 5), np.uint8), "PNG"))
    with pytest.raises(DataError, match="mask must be a PNG"):
        write_shards(catalog, tmp_path / "shards", progress=False)


def test_a_mask_of_a_picture_that_is_turned_when_decoded_is_refused(catalog, tmp_path):
    record = next(record for record in catalog.records if record.mask is not None)
    with Image.open(record.path) as picture:
        turned = picture.getexif()
        turned[0x0112] = 3
        picture.save(record.path, format="JPEG", exif=turned)
    with pytest.raises(DataError, match=rf"{record.path.name}: is turned by its EXIF orientation, its mask isn't"):
        write_shards(catalog, tmp_path / "turned", progress=False)


def test_an_empty_catalogue_is_refused(catalog, tmp_path):
    with pytest.raises(DataError, match="no pictures"):
        write_shards(replace(catalog, records=()), tmp_path / "shards", progress=False)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["enospc", "limit"])
def test_a_full_disk_leaves_nothing(catalog, tmp_path, monkeypatch, how):
    target = tmp_path / "out" / "shards"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "enospc":
        append, calls = tarfile.TarFile.addfile, []

        def fails(*arguments):
            calls.append(1)
            if len(calls) == 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(*arguments)

        monkeypatch.setattr(tarfile.TarFile, "addfile", fails)
    else:  # the kernel itself refuses to write on
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
    try:
        with pytest.raises(DataError, match=f"^{target}: could not be written"):
            write_shards(catalog, target, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(target.parent) == []


SLOW_WRITER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import ppreid_dist.data.shard_writer as writer
from make_shards import make_catalog, part_of
catalog = make_catalog(Path({raw!r}))
append = writer._append
def slowly(*arguments):
    time.sleep(0.02)
    return append(*arguments)
writer._append = slowly
print("writing", flush=True)
writer.write_shards(catalog, Path({out!r}), images_per_shard=4, progress=False)
"""


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_no_half_folder_and_the_next_one_writes_it(tmp_path, number):
    out, raw = tmp_path / "out" / "shards", tmp_path / "raw"
    code = SLOW_WRITER.format(tests=str(Path(__file__).parent), raw=str(raw), out=str(out))
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert writer.stdout.readline() == b"writing\n"
    while not list(out.parent.glob(".shards.*/train-000001.tar")):  # in the middle of its second shard
        assert writer.poll() is None
        time.sleep(0.01)
    writer.send_signal(number)
    writer.wait(timeout=20)
    writer.stdout.close()
    assert writer.returncode != 0
    assert not out.exists()
    if number == signal.SIGINT:
        assert os.listdir(out.parent) == []
    catalog = make_catalog(tmp_path / "raw2")
    write_shards(catalog, out, images_per_shard=4, progress=False)
    assert check_shards(out, progress=False) == []
