r"""CAT filtering: keep pairs whose caption has C >= 1 and an action, and is not text in the image.

Method: DiHT, arXiv 2301.02280. The comment at each value is its source: "paper" (read in papers
that describe it), "recalled" (from memory, not checked), "ours" (our own choice). The input may be
webdataset tars, jsonl/csv/tsv with an image folder, TFDS or our own shards; see
docs/guides/prepare/sources.md.

Run:

    python -m data_prep.filter --config prep/cat \
        --config.input='/data/raw/*.tar' --config.output=/data/kept

Expected: TFRecord shards with their statistics in the output folder, and the funnel on the screen.
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; its values are also the defaults of the filter."""
    config = default_config()
    config.complexity = True  # paper
    config.min_complexity = 1  # paper
    config.action = True  # paper
    config.text_spotting = True  # paper
    config.spotter.min_chars = 5  # recalled
    # Ours, calibrated for EasyOCR (docs/benchmarks/text_spotting.md). Recalled: 0.8 on the scale of
    # another spotter.
    config.spotter.min_confidence = 0.1
    # Ours: words are weighted by their frequency. Recalled: any 5 matching characters.
    config.spotter.weigh_words = True
    return config
