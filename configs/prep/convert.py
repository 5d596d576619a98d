r"""No caption filter: any source of pairs into TFRecord shards, for names, labels and clean sets.

Images are still checked: empty, unreadable and oversized ones are counted and left out.

Run:

    python -m data_prep.filter --config prep/convert \
        --config.input=emoji_google.tar --config.output=/data/emoji

Expected: as many records as there are readable pairs (3,786 for the emoji).
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Nothing is parsed or spotted: neither spaCy nor EasyOCR is needed.

    `concepts=True` is for data_prep.label.
    """
    config = default_config()
    config.complexity = False
    config.action = False
    config.text_spotting = False
    config.concepts = False
    return config
