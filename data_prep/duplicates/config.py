"""Config of `python -m data_prep.duplicates`: its keys, and checks of their values."""

from __future__ import annotations

from typing import Any

import ml_collections

from data_prep.duplicates.search import KEEP
from data_prep.jobs import failures
from data_prep.jobs.shards import IDENTITIES
from data_prep.sources import default_source
from diht_jax.config.checks import check_unset
from diht_jax.config.keys import (
    COUNT,
    NOT_NEGATIVE,
    SHARE_NOT_0,
    Key,
    OneOf,
    Range,
    build_config,
    check_ranges,
)

KEYS: dict[str, Any] = failures.KEYS | {
    "input": str,  # source as in docs/guides/prepare/sources.md; None: the keys in the embeddings
    "output": str,  # folder or URL of the table and the report
    # How changed inputs are detected: "time", "hash" or "size"; docs/guides/prepare/shards.md.
    "input_identity": Key("time", OneOf(IDENTITIES)),
    "exact": True,  # find images with equal bytes
    # "descriptor": colours and shapes at 8 x 8, for edited copies; "files": embeddings from
    # `embeddings.files`; "none": exact copies only.
    "embeddings.kind": Key("descriptor", OneOf(("descriptor", "files", "none"))),
    # Treat mirror images as similar, in the descriptor and in the verification.
    "embeddings.mirrored": False,
    # With an input, the --output of diht_jax.embed on the same input. Without an input, a glob of
    # .npz or .parquet files with "key" and "image_emb" from any program. Paths or URLs.
    "embeddings.files": str,
    # Minimum cosine of near-duplicates, or of the candidates to verify.
    "threshold": Key(0.95, Range(-1, 1)),
    # Minimum correlation of thumbnails when one is aligned with the other or a part of it, for
    # pairs found by their cosine (0.95 finds crops); None disables the verification.
    "verify.correlation": Key(float, SHARE_NOT_0),
    # Largest colour difference of a verified copy in any of 8 x 8 parts, as a share of the value
    # range; 1: only grey values are compared.
    "verify.difference": Key(0.08, SHARE_NOT_0),
    # Number of images with the highest cosines that are verified for each image.
    "verify.candidates": Key(8, COUNT),
    # Images repeated with another caption: "keep" marks the pairs, "drop" drops them.
    "other_captions": Key("keep", OneOf(("keep", "drop"))),
    # Image that is kept: the "farthest" from the cluster's centre (SemDeDup), "largest" or "first".
    "keep": Key("farthest", OneOf(KEEP)),
    "clusters.count": Key(int, COUNT),  # None: from rows_per_cluster; 1 compares all pairs of rows
    "clusters.rows_per_cluster": Key(5000, COUNT),  # approximate
    # Number of nearest clusters in which each row is compared; more clusters find more duplicates.
    "clusters.probes": Key(1, COUNT),
    "clusters.iterations": Key(20, COUNT),  # maximum number of k-means iterations
    "clusters.train_rows_per_cluster": Key(256, COUNT),  # random sample for k-means
    "clusters.chunk_rows": Key(65_536, COUNT),  # rows on the devices at a time
    "seed": 0,  # of k-means
    "report_pairs": Key(24, NOT_NEGATIVE),  # pairs of images in the report
    "keep_before_damage": False,  # keep the pairs before the damage of a truncated or damaged tar
}

# Prefix of keys -> files whose comments describe them.
COMMENT_FILES = {
    "": "data_prep/duplicates/config.py data_prep/jobs/failures.py",
    "source.": "diht_jax/readers/*.py",
}


def default_config() -> ml_collections.ConfigDict:
    """Returns a config with every key at its default."""
    c = build_config(KEYS)
    c.source = default_source()
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks the values of a config beyond their types.

    Raises:
        ValueError: a value is out of its range.
    """
    check_unset(config, default_config())
    check_ranges(config, KEYS)
    failures.check_job(config)
    kind = config.embeddings.kind
    if (kind == "files") != (config.embeddings.files is not None):
        raise ValueError("config.embeddings.files goes with config.embeddings.kind='files'")
    if kind == "none" and not config.exact:
        raise ValueError("config.embeddings.kind='none' with config.exact=False finds nothing")
    if config.input is None:
        if kind != "files":
            raise ValueError(
                "config.input is not set: expected pairs, or config.embeddings.kind='files' with "
                "config.embeddings.files"
            )
        if config.verify.correlation is not None:
            raise ValueError("config.verify.correlation needs config.input, to see the pictures")
        if config.keep == "largest":
            raise ValueError("config.keep='largest' needs config.input, to know their sizes")
