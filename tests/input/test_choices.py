"""The choice of a record's caption, and of the caption's sentences, for an example."""

import collections
import json
import pathlib

import numpy as np
import pytest

from data_prep.filter import run_filter
from diht_jax.config import default_config, load_recipe
from diht_jax.data.tokenizer import decode, tokenize
from diht_jax.input.choices import CaptionChoice, open_caption_choice
from diht_jax.input.examples import DecodeExample
from diht_jax.input.order import GlobalOrder, derived_seed
from diht_jax.input.transforms import CROP_RATIO, sample_crop_box
from diht_jax.records.samples import (
    add_columns,
    all_captions,
    merge_captions,
    pick_captions,
    split_sentences,
)
from diht_jax.records.schema import Pair, Record, decode_record, encode_record
from diht_jax.records.train_data import open_records
from tests import make
from tests.make import png
from tests.readers.inputs import JPEG

_CONVERT = pathlib.Path(__file__).resolve().parents[2] / "configs" / "prep" / "convert.py"
# One original caption, two synthetic ones, and one of a third kind.
PAIR = Record(
    key="k",
    image=JPEG,
    caption="usual",
    metadata={
        "captions": ["usual", "first drawn", "second drawn", "title"],
        "caption_kinds": ["alt", "synthetic", "synthetic", "title"],
    },
)


def settings(**values):
    config = default_config()
    config.data.update({"captions": "sample", "batch_size": 8, **values})
    return config.data


def counts(choice, position=0, size=4000):
    numbers = (np.arange(size) + 0.5) / size  # every possible draw, in equal steps
    return collections.Counter(choice.choose(PAIR, number, position) for number in numbers)


def test_captions_come_by_the_weights_of_their_kinds():
    found = counts(open_caption_choice(settings(caption_weights="alt=1,synthetic=2,title=1")))
    assert found == {"usual": 1000, "first drawn": 1000, "second drawn": 1000, "title": 1000}
    found = counts(open_caption_choice(settings(caption_weights="alt=3,synthetic=1,title=0")))
    assert found == {"usual": 3000, "first drawn": 500, "second drawn": 500}
    assert set(counts(open_caption_choice(settings())).values()) == {1000}
    # A missing kind leaves its share to the others; without any, the record's caption is used.
    only = Record("k", JPEG, "a", {"caption_kinds": ["synthetic"]})
    choice = open_caption_choice(settings(caption_weights="alt=1,synthetic=0"))
    assert choice.choose(only, 0.9, 0) == "a"


def test_every_format_gives_the_same_captions_and_the_filter_keeps_their_kinds(tmp_path):
    members = {}
    for i in range(6):
        members |= make.pair_members(str(i), f"picture {i}", JPEG, "jpg")
        members[f"{i}.json"] = json.dumps({"re_caption": f"drawn {i}", "width": 8}).encode()
    make.write_tar(tmp_path / "in" / "a.tar", members)
    columns = "synthetic=re_caption"
    # The first two batches have the original alone: a schedule depends on an example's position.
    weights = {"alt": ((0, 1),), "synthetic": ((0, 0), (2, 1))}

    def tokens(path, **values):
        choice = open_caption_choice(settings(caption_weights=weights, **values))
        decoder = DecodeExample(8, 8, (0.9, 1.0), "{caption}", caption_choice=choice)
        iterator = make.train_iterator(
            make.one_source(open_records(str(path)), decoder, 2),
            batch_size=3,
            seed=2,
            num_workers=0,
        )
        return np.concatenate([batch["tokens"] for batch in make.take_batches(iterator, 8)])

    raw = tokens(tmp_path / "in", caption_columns=columns)
    words = [decode(row).split()[0] for row in raw]
    assert set(words[:16]) == {"picture"} and set(words[16:]) == {"picture", "drawn"}
    for output_format in ("tfrecord", "array_record", "webdataset"):
        config = load_recipe(_CONVERT)
        config.update(
            {"input": f"{tmp_path}/in/*.tar", "output": f"{tmp_path}/{output_format}"}
            | {"num_workers": 0, "output_format": output_format, "caption_columns": columns}
        )
        assert run_filter(config) == {}
        np.testing.assert_array_equal(tokens(tmp_path / output_format), raw)
    record = decode_record(open_records(str(tmp_path / "tfrecord"))[0])
    assert record.metadata["caption_kinds"] == ["alt", "synthetic"]
    assert record.metadata["captions"] == ["picture 0", "drawn 0"]
    assert "re_caption" not in record.metadata and record.metadata["width"] == 8


def test_kinds_stay_with_their_captions():
    # Texts of a table are cleaned, and duplicates are removed.
    stated = ["  usual ", None, "usual", "drawn\n"]
    kinds = {"caption_kinds": ["alt", "x", "y", "synthetic"]}
    merged = merge_captions(kinds, pick_captions(stated), stated)
    assert merged == {"captions": ["usual", "drawn"], "caption_kinds": ["alt", "synthetic"]}
    own = add_columns(Pair("k", b"", "text", {"re": ["new", "text"]}), {"re": "synthetic"}, "title")
    assert own.metadata == {"captions": ["text", "new"], "caption_kinds": ["title", "synthetic"]}
    with pytest.raises(ValueError, match="record 'k': expected a list of texts in 'captions'"):
        all_captions(Pair("k", b"", "a", {"captions": ["a", 3]}))


def test_wrong_records_are_bad_records():
    choice = open_caption_choice(settings(caption_weights="alt=1,synthethic=1"))
    with pytest.raises(ValueError, match="record 'k': config.data.caption_weights has no weight"):
        choice.choose(PAIR, 0.5, 0)
    broken = Record("k", JPEG, "a", {"captions": ["a", "b"], "caption_kinds": ["alt"]})
    choice = CaptionChoice({"alt": ((0, 1),)}, batch_size=8)
    with pytest.raises(ValueError, match="expected the kind of each of its 2 captions"):
        choice.choose(broken, 0.5, 0)


SIZE, SCALE, LENGTH = (31, 23), (0.3, 0.9), 24


@pytest.mark.parametrize(
    "sentences",
    [
        ["A red ball."],
        ["a red ball", "another line", "A third one"],
        ["A red ball.", "It lies on grass!", "Is it new?", "Yes"],
        ["Dr. Smith and J. S. Bach visit St. Gallen vs. Basel.", "It is 3.5 km away."],
        ['He says "Stop!"', '"No."', "(A sign hangs there.)", "3 birds sit on it."],
        ["The sign reads... something old.", "Nobody knows."],
        ["一只红色的球。", "它在草地上！", "是新的吗？"],
    ],
)
def test_texts_are_split_where_their_sentences_end(sentences):
    joint = "\n" if sentences[0].islower() else "" if ord(sentences[0][0]) > 256 else "  "
    assert split_sentences(f" {joint.join(sentences)} ") == sentences
    assert split_sentences("") == []


def sentences_of(index):
    """One to four sentences in each caption; every second record has two captions."""
    captions = [[f"Part {part} of {index}." for part in range(1 + index % 4)]]
    if index % 2:
        captions.append([f"Piece {piece} of {index}." for piece in range(1 + (index + 2) % 4)])
    return captions


def record_of(index):
    """Returns a record with these captions."""
    texts = [" ".join(sentences) for sentences in sentences_of(index)]
    return encode_record(Record(f"{index}", png(index, SIZE), texts[0], {"captions": texts}))


@pytest.mark.parametrize("words", [0, 4])
def test_an_example_has_the_part_of_its_caption_that_seed_and_position_say(words):
    """Philox at the position draws the crop, then numbers for caption, sentences, and words.

    The formula is reimplemented here.
    """
    decode = DecodeExample(
        8, LENGTH, SCALE, "{caption}", caption_sentences=2, caption_words=words,
        caption_choice=CaptionChoice(batch_size=8),
    )  # fmt: skip
    source = make.one_source(make.InMemory(map(record_of, range(20))), decode, 5)
    iterator = make.train_iterator(source, batch_size=8, seed=5, num_workers=0)
    iterator.set_state({"next_example": 16})
    batches = make.take_batches(iterator, 3)
    key = np.random.Philox(derived_seed(5, 3)).state["state"]["key"]
    order = GlobalOrder(20, 5)
    for number, batch in enumerate(batches):
        for row in range(8):
            position = 16 + 8 * number + row
            rng = np.random.Generator(np.random.Philox(key=key, counter=position << 192))
            sample_crop_box(*SIZE, rng, SCALE, CROP_RATIO)
            captions = sentences_of(order[position])
            sentences = captions[int(rng.random() * len(captions))]
            drawn_number = rng.random()
            first = int(drawn_number * (len(sentences) - 1)) if len(sentences) > 2 else 0
            drawn = " ".join(sentences[first : first + 2]).split(" ")  # four or eight words
            if words:
                drawn_number = rng.random()
                start = int(drawn_number * (len(drawn) - 3)) if len(drawn) > 4 else 0
                drawn = drawn[start : start + 4]
            expected = tokenize(" ".join(drawn), LENGTH)[0]
            np.testing.assert_array_equal(batch["tokens"][row], expected)
