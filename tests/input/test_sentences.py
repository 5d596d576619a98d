"""Parts of captions: how texts are split, and which sentences an example has."""

import collections

import numpy as np
import pytest

from diht_jax.data.tokenizer import tokenize
from diht_jax.input.choices import CROP_RATIO, draw_sentences
from diht_jax.input.examples import DecodeExample
from diht_jax.input.order import GlobalOrder, derived_seed
from diht_jax.input.pipeline import TrainIterator
from diht_jax.input.transforms import sample_crop_box
from diht_jax.records.captions import split_sentences
from diht_jax.records.schema import Record, encode_record
from tests.make import png

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


def test_every_part_of_a_length_is_as_likely():
    caption = "One here. Two here. Three here. Four here."
    numbers = (np.arange(1200) + 0.5) / 1200
    found = collections.Counter(draw_sentences(caption, 2, number) for number in numbers)
    parts = ["One here. Two here.", "Two here. Three here.", "Three here. Four here."]
    assert found == dict.fromkeys(parts, 400)
    assert {draw_sentences(caption, 4, number) for number in numbers} == {caption}


class Records:
    """Records of one to four sentences; every second one has two captions."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        text = " ".join(f"Part {part} of {index}." for part in range(1 + index % 4))
        return encode_record(Record(f"{index}", png(index, SIZE), text, {}))


def test_an_example_has_the_sentences_that_seed_and_position_say():
    """Philox at the position draws the crop, then one number; the formula is written here anew."""
    decode = DecodeExample(8, LENGTH, SCALE, "{caption}", caption_sentences=2)
    iterator = TrainIterator(Records(), decode, batch_size=8, seed=5, num_workers=0)
    iterator.set_state({"next_example": 16})
    batches = [next(iterator) for _ in range(3)]
    iterator.close()
    whole = TrainIterator(
        Records(), DecodeExample(8, LENGTH, SCALE, "{caption}"), batch_size=8, seed=5, num_workers=0
    )
    whole.set_state({"next_example": 16})
    key = np.random.Philox(derived_seed(5, 3)).state["state"]["key"]
    order = GlobalOrder(20, 5)
    for number, batch in enumerate(batches):
        for row in range(8):
            position = 16 + 8 * number + row
            rng = np.random.Generator(np.random.Philox(key=key, counter=position << 192))
            sample_crop_box(*SIZE, rng, SCALE, CROP_RATIO)
            record = order[position]
            parts = 1 + record % 4
            first = int(rng.random() * (parts - 1)) if parts > 2 else 0
            texts = [f"Part {part} of {record}." for part in range(parts)][first : first + 2]
            expected = tokenize(" ".join(texts), LENGTH)[0]
            np.testing.assert_array_equal(batch["tokens"][row], expected)
        np.testing.assert_array_equal(batch["images"], next(whole)["images"])
    whole.close()
