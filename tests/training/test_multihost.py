"""What one process reads for all: by broadcasts that are recorded and played to another process."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from diht_jax.training import multihost


@pytest.fixture
def play(monkeypatch):
    """Calls a function as each of some processes, one after the other; gives their results."""
    sent: list[np.ndarray] = []

    def play(function, processes=3):
        results = []
        for number in range(processes):
            replayed = iter(list(sent))

            def broadcast(array, number=number, replayed=replayed):
                if number == 0:
                    sent.append(array)
                    return array
                first = next(replayed)
                assert first.shape == np.shape(array)  # or the collective would fail
                return first

            monkeypatch.setattr(jax, "process_count", lambda: processes)
            monkeypatch.setattr(jax, "process_index", lambda number=number: number)
            monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
            monkeypatch.setattr(multihost, "first_text", lambda text: text)
            results.append(function())
        return results

    return play


@pytest.mark.parametrize("size", [0, 5, 3 * 2**20 + 7])
def test_what_the_first_process_reads_is_given_to_all(play, size):
    data, reads = np.random.default_rng(0).bytes(size), []

    def read():
        reads.append(1)
        return data

    assert play(lambda: multihost.share_from_first(read)) == [data] * 3
    assert len(reads) == 1


def test_an_error_of_the_first_process_is_one_for_all(play):
    def read():
        raise PermissionError("bucket: no")

    with pytest.raises(ValueError, match="PermissionError: bucket: no"):
        play(lambda: multihost.share_from_first(read))


def test_processes_that_have_read_other_checkpoints_are_refused(monkeypatch):
    monkeypatch.setattr(multihost, "gather_texts", lambda text: ["20", text])
    multihost.check_same_step(20)
    with pytest.raises(ValueError, match="checkpoints of steps 20, 40, .* name one by --step"):
        multihost.check_same_step(40)
