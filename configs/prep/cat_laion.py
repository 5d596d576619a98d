r"""CAT filtering of LAION without the pairs that LAION scored as unsafe or watermarked.

Method: DiHT, arXiv 2301.02280, which removes such pairs before CAT. The scores are the columns
`punsafe` and `pwatermark` of LAION's metadata, which img2dataset keeps with
`--save_additional_columns '["punsafe","pwatermark"]'`. Pairs without scores are dropped; see
`config.predicates.missing`.

Run:

    python -m data_prep.filter --config prep/cat_laion \
        --config.input='/data/laion/*.tar' --config.output=/data/kept

Expected: as in configs/prep/cat.py, with the stage "metadata" first in the funnel.
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the filter's defaults with two conditions, which also work on lists of URLs."""
    config = default_config()
    # pwatermark < 0.5 is the paper's limit; the limit of punsafe is ours.
    config.predicates.require = ("punsafe < 0.5", "pwatermark < 0.5")
    config.predicates.missing = "drop"
    return config
