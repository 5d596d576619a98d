r"""C and A on metadata before the download: parquet or jsonl with a column of captions.

Method: DiHT, arXiv 2301.02280. The kept rows are written unchanged, to files of the same names.
Then download them (img2dataset) and filter the result with configs/prep/cat.py, which adds T.

Run (LAION's caption column TEXT and DataComp's text are found by name; set
--config.source.caption_column for others):

    python -m data_prep.filter --config prep/metadata \
        --config.input='/laion/*.parquet' --config.output=/laion_kept

Expected: about half of the rows; report.html counts the others by reason.
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe: no images and no text spotting; large units, because rows are small."""
    config = default_config()
    config.metadata_only = True
    config.complexity = True
    config.action = True
    config.text_spotting = False
    config.concepts = False
    config.source.rows_per_shard = 100_000
    return config
