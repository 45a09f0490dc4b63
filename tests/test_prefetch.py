"""Work ahead in a thread of its own: in order, not too far, and gone when nobody asks any more."""

import gc
import itertools
import threading
import time

import pytest
import torch

from ppreid_dist.data.prefetch import Prefetcher


def test_results_come_in_order_and_end():
    assert list(Prefetcher(lambda x: x * x, iter(range(50)), 3)) == [x * x for x in range(50)]


def test_it_works_ahead_but_not_further_than_asked():
    done = []
    ahead = Prefetcher(lambda x: done.append(x) or x, itertools.count(), 3)
    next(ahead)
    deadline = time.monotonic() + 10
    while len(done) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(done) == 5  # one taken, three waiting, one in hand
    ahead.close()


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", ["cuda:1"]), ("cuda", ["cuda:3"]), ("cpu", []), (None, [])])
def test_its_thread_has_the_process_s_gpu(monkeypatch, device, chosen):
    seen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)  # of the process's own thread
    monkeypatch.setattr(torch.cuda, "set_device", lambda on: seen.append((threading.current_thread().name, str(on))))
    assert list(Prefetcher(lambda x: (x, len(seen)), iter(range(3)), 1, device=device)) == [
        (x, len(chosen)) for x in range(3)
    ]
    assert seen == [("prefetch", name) for name in chosen]


def test_errors_come_in_their_place_and_end_it():
    ahead = Prefetcher(lambda x: 6 // (2 - x), itertools.count(), 4)
    assert [next(ahead), next(ahead)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


def test_closed_and_abandoned_prefetchers_leave_no_thread():
    before = set(threading.enumerate())  # of another test, perhaps, and about to end
    closed = Prefetcher(lambda x: x, itertools.count(), 2)
    next(closed)
    closed.close()
    closed.close()
    abandoned = Prefetcher(lambda x: x, itertools.count(), 2)
    next(abandoned)
    del abandoned
    gc.collect()
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
