r"""CAT filtering of LAION's pairs without those that LAION scored as unsafe or watermarked.

Method: DiHT, arXiv 2301.02280, which removed such pairs before CAT. The scores are the columns
`punsafe` and `pwatermark` of LAION's metadata, which img2dataset keeps with
`--save_additional_columns '["punsafe","pwatermark"]'`; a pair without them is dropped, see
`config.predicates.missing`.

Run:

    python -m data_prep.filter --config prep/cat_laion \
        --config.input='/data/laion/*.tar' --config.output=/data/kept

Expected: as configs/prep/cat.py, with the stage "metadata" first in the funnel.
"""

import ml_collections

from data_prep.filtering.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """The defaults of the filter with two conditions; a list of URLs is filtered by them too."""
    config = default_config()
    # 0.5 of watermarks: the paper's; of punsafe: ours.
    config.predicates.require = ("punsafe < 0.5", "pwatermark < 0.5")
    config.predicates.missing = "drop"
    return config
