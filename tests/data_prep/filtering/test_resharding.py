"""Plans of output shards of equal size."""

import types

import numpy as np
import pytest

from data_prep.filtering import resharding
from data_prep.filtering.config import default_config


@pytest.mark.parametrize(
    ("counts", "examples", "sizes"),
    [
        ([5, 0, 7, 1], 4, [3, 3, 3, 4]),
        ([5, 0, 7, 1], 13, [13]),
        ([0, 0], 4, [0]),
        ([3], 2, [1, 2]),
    ],
)
def test_plan_covers_every_record_once_in_order(tmp_path, counts, examples, sizes):
    config = default_config()
    config.examples_per_shard = examples
    parts = []
    for number, count in enumerate(counts):
        output = {"records": count, "digest": f"{number}", "companions": {}}
        task = types.SimpleNamespace(output=f"p{number}.tfrecord")
        parts.append((task, {"config_hash": "c", "output": output}))
    planned = resharding.plan_shards(parts, str(tmp_path), config)
    assert [sum(s.stop - s.start for s in shard.slices) for shard in planned] == sizes
    starts = dict(zip([t.output for t, _ in parts], np.cumsum([0, *counts]), strict=False))
    covered = [
        int(starts[s.path]) + n
        for shard in planned
        for s in shard.slices
        for n in range(s.start, s.stop)
    ]
    assert covered == list(range(sum(counts)))
    assert len({shard.plan_hash for shard in planned}) == len(planned)
