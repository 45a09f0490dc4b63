"""The plan of batches: pure, unique over the global batch, alike for every number of processes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppreid_dist.data.plan import PKPlan, StrangersPlan
from ppreid_dist.errors import ConfigError

people = st.lists(st.integers(1, 6), min_size=4, max_size=24)  # pictures of each person


def _pids(counts, seed=0):
    numbers = np.repeat(np.arange(len(counts)) * 7 + 3, counts)  # neither contiguous nor from 0
    return np.random.default_rng(seed).permutation(numbers)


@settings(max_examples=60, deadline=None)
@given(people, st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31), st.integers(0, 500))
def test_every_batch_has_distinct_people_with_k_pictures_of_their_own(counts, P, K, seed, step):
    pids = _pids(counts)
    rows = PKPlan(pids, P, K, seed).batch(step)
    assert rows.shape == (P * K,)
    groups = rows.reshape(P, K)
    assert (pids[groups] == pids[groups[:, :1]]).all()
    assert len(set(pids[groups[:, 0]])) == P
    for group in groups:
        available = int((pids == pids[group[0]]).sum())
        assert len(set(group)) == min(K, available)  # with fewer than K: all of them, then repeats
        uses = Counter(group.tolist()).values()
        assert max(uses) - min(uses) <= 1


@settings(max_examples=30, deadline=None)
@given(people, st.sampled_from([1, 2, 4]), st.integers(0, 100))
def test_the_ranks_together_read_the_global_batch(counts, world, step):
    pids = _pids(counts)
    whole = PKPlan(pids, 4, 3, seed=5).batch(step)
    share = len(whole) // world
    parts = [PKPlan(pids, 4, 3, seed=5).batch(step)[r * share : (r + 1) * share] for r in range(world)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_resumed_plan_goes_on_where_the_unbroken_one_was():
    pids = _pids([3] * 11)
    unbroken = PKPlan(pids, 4, 2, seed=1)
    history = [unbroken.batch(step) for step in range(20)]
    for step in (19, 3, 7):  # in any order, by a fresh plan
        assert np.array_equal(PKPlan(pids, 4, 2, seed=1).batch(step), history[step])
    assert not np.array_equal(history[0], PKPlan(pids, 4, 2, seed=2).batch(0))
    assert len({tuple(batch) for batch in history}) == 20


def test_an_epoch_shows_each_person_at_most_once_and_drops_the_remainder():
    pids = _pids([2] * 11)
    plan = PKPlan(pids, 4, 2, seed=0)
    for epoch in range(5):
        seen = np.concatenate([pids[plan.batch(2 * epoch + i)[::2]] for i in range(2)])
        assert len(set(seen)) == 8
    everyone = {pid for step in range(20) for pid in pids[plan.batch(step)]}
    assert everyone == set(pids)  # the dropped ones differ between epochs


def test_pictures_are_drawn_evenly():
    pids = np.repeat([1, 2], [10, 3])
    plan = PKPlan(pids, 2, 2, seed=0)
    uses = Counter(row for step in range(2000) for row in plan.batch(step).tolist())
    assert all(abs(uses[row] - 400) < 80 for row in range(10))  # 2000 * 2 / 10, five standard deviations
    assert all(abs(uses[row] - 1333) < 130 for row in range(10, 13))


@settings(max_examples=40, deadline=None)
@given(people, st.integers(1, 4), st.integers(0, 300))
def test_strangers_are_distinct(counts, count, step):
    pids = _pids(counts)
    rows = StrangersPlan(pids, count, seed=0).batch(step)
    assert len(set(pids[rows])) == count == len(rows)
    assert np.array_equal(rows, StrangersPlan(pids, count, seed=0).batch(step))


def test_strangers_come_with_all_their_pictures_in_time():
    pids = _pids([4] * 6)
    plan = StrangersPlan(pids, 3, seed=0)
    assert {row for step in range(300) for row in plan.batch(step).tolist()} == set(range(24))


def test_too_few_people_are_a_configuration_error_with_the_numbers():
    with pytest.raises(ConfigError, match=r"^data\.identities_per_batch: 5 asked for, but the split has 4"):
        PKPlan(_pids([2] * 4), 5, 2, seed=0)
    with pytest.raises(ConfigError, match=r"^privacy\.ridge\.strangers: 5 asked for, but the split has 4"):
        StrangersPlan(_pids([2] * 4), 5, seed=0)
