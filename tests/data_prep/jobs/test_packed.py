"""A packed list against a plain one."""

import pickle

import pytest

from data_prep.jobs.packed import PackedList


@pytest.mark.parametrize("per_block", [1, 3, 128])
def test_it_is_a_list(per_block):
    plain = [("name", number) for number in range(10)]
    packed = PackedList(iter(plain), per_block)
    assert len(packed) == 10 and list(packed) == plain and ("name", 4) in packed
    assert [packed[i] for i in (0, 9, 3, 4, 2, -1, -10)] == [
        plain[i] for i in (0, 9, 3, 4, 2, -1, -10)
    ]
    for part in (slice(None), slice(2, 7), slice(1, None, 4), slice(7, 2), slice(None, None, -3)):
        assert list(packed[part]) == plain[part]
    for index in (10, -11):
        with pytest.raises(IndexError):
            packed[index]
    assert list(pickle.loads(pickle.dumps(packed))) == plain
    assert not PackedList(()) and list(PackedList(())) == []
