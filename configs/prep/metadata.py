r"""C and A on metadata, before anything is downloaded: parquet or jsonl with a column of captions.

Method: DiHT, arXiv 2301.02280. The kept rows are written as they came, to files of the same names;
then download them (img2dataset) and filter the result with configs/prep/cat.py, which adds T.

Run (LAION's column of captions TEXT, and DataComp's text, are found by their names; another is
named by --config.source.caption_column):

    python -m data_prep.filter --config prep/metadata \
        --config.input='/laion/*.parquet' --config.output=/laion_kept

Expected: about half of the rows; report.html counts the others by reason.
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """No image is read, so nothing is spotted; units are large, since rows are small."""
    config = default_config()
    config.metadata_only = True
    config.complexity = True
    config.action = True
    config.text_spotting = False
    config.concepts = False
    config.source.rows_per_shard = 100_000
    return config
