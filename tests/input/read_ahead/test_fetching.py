"""Requests: retried with pauses, hedged, and given up with the URL; the clock is the test's."""

import errno

import pytest

from diht_jax.input.read_ahead.fetching import Fetcher, try_patiently
from diht_jax.storage.retries import StorageError


class Store:
    """A store of simulated time: each request is answered when the test says so."""

    def __init__(self, **options):
        self.now = 0.0
        self.waiting = []  # (time of the request, function that answers it)
        self.finished = {}
        self.answer = lambda key, number: b"bytes of " + key.encode()
        self.requested = []
        settings = {"timeout_secs": 600.0, "jitter": lambda: 0.5, **options}
        self.fetcher = Fetcher(
            self._request,
            self.finished.__setitem__,
            describe="gs://bucket/{}".format,
            clock=lambda: self.now,
            start=lambda run: self.waiting.append((self.now, run)),
            **settings,
        )

    def _request(self, key):
        self.requested.append(key)
        return self.answer(key, len(self.requested))

    def run(self, secs, latency=0.05, step=0.05):
        """Lets time pass; answers each request after its latency."""
        finished, end = [], self.now + secs
        while self.now < end:
            self.now += step
            due = [item for item in self.waiting if item[0] + latency <= self.now + 1e-9]
            self.waiting = [item for item in self.waiting if item not in due]
            for _, answer in due:
                answer()
            finished += self.fetcher.poll(0)
        return finished


def unavailable(*_):
    raise OSError("503 Service Unavailable")


def test_requests_are_under_way_at_the_same_time():
    store = Store()
    for key in "abc":
        store.fetcher.fetch(key)
    assert len(store.waiting) == len(store.fetcher) == 3
    assert sorted(store.run(0.1)) == ["a", "b", "c"]
    assert store.finished == {key: b"bytes of " + key.encode() for key in "abc"}
    assert len(store.fetcher) == 0 and store.fetcher.requests == 3


def test_one_failing_request_in_twenty_is_sent_again():
    store = Store()

    def answer(key, number):
        if number % 20 == 0:
            raise ConnectionResetError("reset by peer")
        return key.encode()

    store.answer = answer
    keys = [f"block {number}" for number in range(100)]
    for key in keys:
        store.fetcher.fetch(key)
    assert sorted(store.run(2)) == sorted(keys)
    assert store.fetcher.failed_requests == store.fetcher.requests - 100 == 5
    assert store.fetcher.last_error.startswith("gs://bucket/block ")


def test_a_store_that_is_unavailable_for_a_minute_costs_a_minute():
    store = Store()
    store.answer = unavailable
    for key in "abcdefgh":
        store.fetcher.fetch(key)
    assert store.run(60) == []
    # 0.1, 0.2, ... 3.2, 5, 5 s: some 20 requests for each, not thousands.
    assert store.fetcher.requests < 8 * 25
    store.answer = lambda key, number: b"there"
    assert sorted(store.run(6)) == list("abcdefgh")


def test_pauses_double_up_to_five_seconds_and_vary():
    times = []
    store = Store(jitter=lambda: 0.0)
    store.answer = lambda *_: times.append(store.now) or unavailable()
    store.fetcher.fetch("a")
    store.run(40, latency=0.0, step=0.01)
    pauses = [b - a for a, b in zip(times, times[1:], strict=False)]
    expected = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5]
    assert pauses[:8] == pytest.approx(expected, abs=0.03)


def test_a_lasting_failure_names_url_reason_and_key():
    store = Store(timeout_secs=30.0)
    store.answer = unavailable
    store.fetcher.fetch("a.tfrecord")
    with pytest.raises(StorageError, match=r"gs://bucket/a\.tfrecord: .*503 Service") as error:
        store.run(40)
    assert 30 <= store.now < 31
    assert "run the command again" in str(error.value)
    assert "config.data.read_timeout_secs" in str(error.value)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("a"), PermissionError("403"), OSError(errno.EISDIR, "folder")]
)
def test_an_error_that_waiting_does_not_end_is_final(error):
    def answer(*_):
        raise error

    store = Store()
    store.answer = answer
    store.fetcher.fetch("a")
    with pytest.raises(StorageError, match="gs://bucket/a"):
        store.run(1)


def test_a_request_without_an_answer_is_overtaken():
    store = Store()
    for number in range(20):  # so that the usual time is known
        store.fetcher.fetch(f"block {number}")
    store.run(0.1)
    store.fetcher.fetch("slow")
    stuck = store.waiting.pop()
    began = store.now
    assert store.run(0.9) == []
    assert store.run(0.3) == ["slow"]
    assert store.fetcher.hedged_requests == 1 and store.now - began < 1.3
    # Its answer comes after all, and is thrown away.
    store.finished.clear()
    stuck[1]()
    assert store.fetcher.poll(0) == [] and not store.finished


def test_requests_that_all_take_long_are_not_doubled():
    store = Store()
    for number in range(20):
        store.fetcher.fetch(f"block {number}")
    store.run(4.1, latency=4.0)
    assert store.fetcher.requests == 20
    store.fetcher.fetch("as usual")
    store.run(4.1, latency=4.0)
    assert store.fetcher.requests == 21


def test_no_answer_at_all_is_an_error_in_the_end():
    store = Store(timeout_secs=100.0)
    store.fetcher.fetch("a")
    with pytest.raises(StorageError, match="no answer came"):
        store.run(200, latency=1e9)
    assert store.fetcher.requests == 4  # after 10, 20 and 40 s


def test_what_the_use_of_an_answer_raises_comes_out():
    def finish(key, data):
        raise StorageError("the disk is full")

    store = Store()
    store.fetcher._finish = finish
    store.fetcher.fetch("a")
    with pytest.raises(StorageError, match="the disk is full"):
        store.run(1)
    assert store.fetcher.failed_requests == 0


def test_a_single_request_is_tried_for_as_long():
    now, calls = [0.0], []

    def read():
        calls.append(now[0])
        if now[0] < 60:
            raise OSError("503 Service Unavailable")
        return "there"

    def sleep(secs):
        now[0] += secs

    options = {"clock": lambda: now[0], "sleep": sleep}
    assert try_patiently(read, 600.0, **options) == "there"
    assert 60 <= now[0] <= 65 and len(calls) < 30
    now[0] = 0.0
    with pytest.raises(OSError, match="503"):
        try_patiently(read, 30.0, **options)
    assert 30 <= now[0] <= 35
    for error in (FileNotFoundError("a"), ValueError("damaged")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            try_patiently(fail, 600.0, **options)
    assert now[0] <= 35
