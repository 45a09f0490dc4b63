"""The catalogue: counts beside the published ones, and people held out for the attackers."""

import numpy as np
import pytest

from ppreid_dist.data.catalog import Catalog, hold_out
from ppreid_dist.data.records import SPLITS, Record
from ppreid_dist.errors import ConfigError


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
