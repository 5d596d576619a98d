"""Mixtures of sources: exact shares, epochs, captions, hosts, resume and read-ahead."""

import collections
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest

from diht_jax.config import default_config
from diht_jax.data.tokenizer import tokenize
from diht_jax.input import mixing
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import MAX_CYCLE, Mixture, MixtureWeights, exact_shares, open_mixture
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.schema import Record, encode_record
from diht_jax.records.train_data import fingerprint_records, parse_weights
from tests import make
from tests.make import InMemory, encoded, plain


class Grey(InMemory):
    """Records of one grey level each, from `first` on, so that a batch shows their source."""

    def __init__(self, first, size, bad=()):
        images = [encoded(plain((first + index,) * 3, (2, 2))) for index in range(size)]
        for index in bad:
            images[index] = b"no picture"
        super().__init__(
            encode_record(Record(key=f"{first}+{index}", image=image, caption="text"))
            for index, image in enumerate(images)
        )
        self._first = first

    def locate(self, index):
        return f"{self._first}.tfrecord", index


SOURCES = {"/many": Grey(0, 90), "/few": Grey(100, 17), "/third": Grey(200, 30)}


def section(**values):
    config = default_config()
    config.data.update({"batch_size": 8, "block_records": 4, "window_blocks": 2, **values})
    return config.data


def mixture(train, sources=SOURCES, **values):
    with mock.patch.object(mixing, "open_records", lambda path, key: sources[path]):
        return open_mixture(
            section(train=train, **values),
            seed=3,
            make_decoder=lambda template: DecodeExample(2, 8, (1.0, 1.0), template),
        )


def two(order):
    return {
        "many": {"path": "/many", "weight": 0.8, "order": order},
        "few": {"path": "/few", "weight": 0.2, "text_template": "a photo of {caption}"},
    }


def batches(mixed, count=1, **options):
    iterator = make.train_iterator(mixed, batch_size=8, seed=3, num_workers=0, **options)
    return make.take_batches(iterator, count)


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_every_source_has_its_share_and_its_own_epochs(order):
    mixed = mixture(two(order))
    greys = [int(g) for b in batches(mixed, 60) for g in b["images"][:, 0, 0, 0]]
    is_few = np.array(greys) >= 100
    windows = np.convolve(is_few, np.ones(5, int), "valid")
    assert set(windows.tolist()) == {1}  # batches have 8 rows, and 8 and 5 are coprime
    # A source's positions form epochs, up to the rows by which streams run ahead.
    few = np.array(greys)[is_few]
    for start in range(0, len(few) - 17, 17):
        seen = collections.Counter(few[max(0, start - 8) : start + 17 + 8].tolist())
        assert set(seen) == set(range(100, 117))
    many = np.array(greys)[~is_few]
    assert len(set(many[: 90 + 8].tolist())) == 90
    metrics = mixed.metrics(480)
    assert metrics == {
        "sources/many/examples": 384.0,
        "sources/many/epochs": 384 / 90,
        "sources/few/examples": 96.0,
        "sources/few/epochs": 96 / 17,
    }
    assert mixed.num_records == 107


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_two_sources_of_one_folder_come_in_different_orders(order):
    train = {name: {"path": "/many", "weight": 1} for name in ("once", "again")}
    once, again = (source.order for source in mixture(train, order=order).sources)
    numbers = [[order[position] for position in range(90)] for order in (once, again)]
    assert sorted(numbers[0]) == sorted(numbers[1]) == list(range(90))
    assert sum(map(int.__eq__, *numbers)) < 20  # positions with the same record


def test_each_source_has_its_own_captions_and_keys():
    mixed = mixture(two("blocks"))
    (batch,) = batches(mixed)
    for grey, tokens in zip(batch["images"][:, 0, 0, 0], batch["tokens"], strict=True):
        text = "a photo of text" if grey >= 100 else "text"
        np.testing.assert_array_equal(tokens, tokenize([text], 8)[0])
    keys = make.train_iterator(mixed, batch_size=8, seed=3, num_workers=0).keys(0)
    assert [int(key.split("+")[0]) >= 100 for key in keys] == (
        batch["images"][:, 0, 0, 0] >= 100
    ).tolist()
    assert {mixed.locate(position)[0] for position in range(8)} == {"0.tfrecord", "100.tfrecord"}


def test_a_bad_record_is_replaced_by_one_of_its_source():
    bad = {**SOURCES, "/few": Grey(100, 17, bad=(3, 4, 5))}
    options = {"on_bad_record": "skip", "count": 40}
    plain = [b["images"][:, 0, 0, 0] >= 100 for b in batches(mixture(two("blocks")), **options)]
    found = batches(mixture(two("blocks"), sources=bad), **options)
    np.testing.assert_array_equal(plain, [b["images"][:, 0, 0, 0] >= 100 for b in found])
    greys = {int(grey) for b in found for grey in b["images"][:, 0, 0, 0]}
    assert greys == {*range(90), *range(100, 117)} - {103, 104, 105}


def test_the_fingerprint_covers_all_sources(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make.write_shard(tmp_path / name / "x.tfrecord", [SOURCES["/many"][ord(name) - 90]])
    train = {name: {"path": str(tmp_path / name), "weight": 1} for name in ("a", "b")}

    def fingerprint(train):
        sources = {str(tmp_path / name): TFRecordSource(tmp_path / name) for name in ("a", "b")}
        return mixture(train, sources=sources).fingerprint()

    both = fingerprint(train)
    assert [shard[0] for shard in both.shards] == ["a/x.tfrecord", "b/x.tfrecord"]
    alone = fingerprint(str(tmp_path / "a"))
    assert alone == fingerprint_records(TFRecordSource(tmp_path / "a"))
    assert isinstance(mixture("/many"), Mixture) and mixture("/many").metrics(8) == {}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("/many", r"config.data.train.a: expected a section such as dict\(path="),
        ({"path": "/many", "weight": 1, "tempalte": "x"}, "a.tempalte: no such key; did you mean"),
        ({"path": "/many", "weight": [(0, 1), (9, 0)]}, "all weights are 0 from step 9 on"),
        (
            {"path": "/many", "weight": 1, "text_template": "{caption} {caption}"},
            "a.text_template=.*: expected {caption} once",
        ),
        ({"path": "/none", "weight": 1}, "config.data.train.a.path: .*holds no record"),
    ],
)
def test_errors_name_the_key_as_it_is_typed(section, message):
    with pytest.raises(ValueError, match=message):
        mixture({"a": section}, sources={**SOURCES, "/none": Grey(0, 0)})


def fractions(*values):
    return [Fraction(value) for value in values]


SCHEDULE = [(0, fractions("0.8", "0.2", 0)), (3, fractions(1, 1, 1)), (10, fractions(0, 1, 1))]


@pytest.mark.parametrize("num_streams", [1, 4, 6, 12])
def test_own_positions_are_used_once_and_stay_in_their_stream(num_streams):
    shares = MixtureWeights(SCHEDULE, num_streams=num_streams, batch_size=12)
    rows = [shares.find(position) for position in range(12 * 60)]
    used = collections.defaultdict(list)
    for position, (source, own) in enumerate(rows):
        assert own % num_streams == position % num_streams
        used[source, own % num_streams].append(own // num_streams)
    for counts in used.values():
        assert counts == list(range(len(counts)))
    for position in range(0, len(rows), num_streams):
        before = collections.Counter(source for source, _ in rows[:position])
        assert shares.counts(position) == [before[source] for source in range(3)]
    # The schedule: nothing of the third source before step 3, nothing of the first from 10 on.
    assert 2 not in {source for source, _ in rows[: 3 * 12]}
    assert 0 not in {source for source, _ in rows[10 * 12 :]}


def test_shares_are_those_of_the_weights_however_they_are_typed():
    assert exact_shares(fractions("0.8", "0.2")) == fractions("4/5", "1/5")
    assert exact_shares(fractions(30, 10)) == fractions("3/4", "1/4")
    assert parse_weights("weight", 0.8) == parse_weights("weight", np.float64(0.8))
    sizes = fractions(413_871_335, 1_000_003, 7)
    rounded = exact_shares(sizes)
    assert sum(rounded) == 1 and min(rounded) > 0
    for share, size in zip(rounded, sizes, strict=True):
        assert abs(share - size / sum(sizes)) <= Fraction(3, MAX_CYCLE)
