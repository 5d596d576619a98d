r"""CAT filtering: keep a pair whose caption has C >= 1 and an action, and is not in the picture.

Method: DiHT, arXiv 2301.02280. "paper" is read in papers that describe it, "recalled" is from
memory of it and not checked, "ours" is our own choice. The input may be webdataset tars,
jsonl/csv/tsv with an image folder, TFDS or our own shards; docs/guides/prepare/sources.md has the
forms.

Run:

    python -m data_prep.filter --config prep/cat \
        --config.input='/data/raw/*.tar' --config.output=/data/kept

Expected: TFRecord shards with their statistics in the output folder, and the funnel on the screen.
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """The values that decide; they are the defaults of the filter too."""
    config = default_config()
    config.complexity = True  # paper
    config.min_complexity = 1  # paper
    config.action = True  # paper
    config.text_spotting = True  # paper
    config.spotter.min_chars = 5  # recalled
    # Ours, calibrated for EasyOCR (docs/benchmarks/text_spotting.md). Recalled: 0.8 of another
    # spotter's scale.
    config.spotter.min_confidence = 0.1
    # Ours: words count by how common they are. Recalled: any 5 characters that match.
    config.spotter.weigh_words = True
    return config
