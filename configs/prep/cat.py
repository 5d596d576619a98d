"""CAT filtering: keep a pair whose caption has C >= 1 and an action, and is not in the picture.

Method: DiHT, arXiv 2301.02280. Reads webdataset tars, jsonl/csv/tsv with an image folder, TFDS and
our own shards; docs/data.md has the forms.

Run:

    python -m data_prep.filter --config configs/prep/cat.py \\
        --config.input='/data/raw/*.tar' --config.output=/data/kept

Expected: TFRecord shards with their statistics in the output folder, and the funnel on the screen.
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """The defaults of the filter are this recipe; the switches are listed here to be seen."""
    config = default_config()
    config.complexity = True
    config.min_complexity = 1
    config.action = True
    config.text_spotting = True
    return config
