r"""Conversion to TFRecord shards without caption filters, for names, labels and clean data sets.

Images are still checked: empty, unreadable and oversized ones are counted and dropped.

Run:

    python -m data_prep.filter --config prep/convert \
        --config.input=emoji_google.tar --config.output=/data/emoji

Expected: one record per readable pair (3,786 for the emoji).
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns a recipe without parsing or text spotting; it needs neither spaCy nor EasyOCR.

    `concepts=True` is for data_prep.label.
    """
    config = default_config()
    config.complexity = False
    config.action = False
    config.text_spotting = False
    config.concepts = False
    return config
