"""Errors that are raised in all processes of a job; `test_processes.py` runs real jobs."""

import jax
import pytest

from diht_jax.training import multihost


def test_an_error_of_the_first_process_is_one_for_all(monkeypatch):
    def read():
        raise PermissionError("bucket: no")

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for number, other in ((0, ""), (1, "lasting:PermissionError: bucket: no")):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        monkeypatch.setattr(multihost, "gather_texts", lambda text, other=other: [other or text])
        with pytest.raises(ValueError, match="PermissionError: bucket: no"):
            multihost.share_from_first(read)


def test_processes_that_have_read_other_checkpoints_are_refused(monkeypatch):
    monkeypatch.setattr(multihost, "gather_texts", lambda text: ["20", text])
    multihost.check_same_step(20)
    with pytest.raises(ValueError, match="checkpoints of steps 20, 40, .* name one by --step"):
        multihost.check_same_step(40)
