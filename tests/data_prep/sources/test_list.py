"""The share of one job of a job array."""

import pytest

from data_prep.sources.list import shards_of_task


def test_jobs_of_an_array_share_all_tasks():
    parts = [shards_of_task(range(11), i, 4) for i in range(4)]
    assert sorted(sum(parts, [])) == list(range(11))
    for index in (-1, 4):
        with pytest.raises(ValueError, match="expected an index from 0 to 3"):
            shards_of_task(range(11), index, 4)
