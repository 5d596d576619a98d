"""What a contrastive loss learns about the batch on its way, which the metrics are made of.

Filled in by `dense.py` and `streaming.py`; read by `total.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class PairStatistics(NamedTuple):
    """Cosine similarities of the local rows with the global batch; all arrays are [b].

    Attributes:
        positive: of the pair.
        image_hardest, text_hardest: highest one of the image (of the text) with a wrong partner.
        image_ties, text_ties: number of wrong partners that reach it.
    """

    positive: jax.Array
    image_hardest: jax.Array
    image_ties: jax.Array
    text_hardest: jax.Array
    text_ties: jax.Array
