"""The config of `python -m data_prep.duplicates`: its keys, and their checks."""

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
    "input": str,  # any source of docs/guides/prepare/sources.md; None: the keys of the embeddings
    "output": str,  # folder of the table and the report, or a URL
    # What counts as the same input, or "hash", "size"; docs/guides/prepare/shards.md.
    "input_identity": Key("time", OneOf(IDENTITIES)),
    "exact": True,  # images of equal bytes are copies
    # "descriptor": colours and shapes at 8 x 8, for copies that were edited; "files": those of
    # `files`; "none": exact copies only.
    "embeddings.kind": Key("descriptor", OneOf(("descriptor", "files", "none"))),
    # Whether a picture and its mirror image are alike, of the descriptor and when verified.
    "embeddings.mirrored": False,
    # With an input the --output of diht_jax.embed on the same input. Without one a glob of .npz or
    # .parquet files with "key" and "image_emb", by whomever. Paths or URLs.
    "embeddings.files": str,
    # Cosine from which two pictures are near-duplicates, or are verified.
    "threshold": Key(0.95, Range(-1, 1)),
    # Of pictures that the cosine finds those are copies whose thumbnails have this correlation when
    # one is laid over the other, or over a part of it (0.95 finds crops); None: all of them are.
    "verify.correlation": Key(float, SHARE_NOT_0),
    # Largest difference of colours that a verified copy may have in one of 8 x 8 parts, as a share
    # of their range; 1: greys alone decide.
    "verify.difference": Key(0.08, SHARE_NOT_0),
    # Pictures of the highest cosines that each one is compared with.
    "verify.candidates": Key(8, COUNT),
    # Pairs whose picture repeats one of another caption: "keep" marks them, "drop" drops them.
    "other_captions": Key("keep", OneOf(("keep", "drop"))),
    # From its cluster's centre (SemDeDup), or the "largest" or "first" picture.
    "keep": Key("farthest", OneOf(KEEP)),
    "clusters.count": Key(int, COUNT),  # None: by rows_per_cluster; 1 compares all with all
    "clusters.rows_per_cluster": Key(5000, COUNT),  # about
    # Nearest clusters in which each row is compared; more find more.
    "clusters.probes": Key(1, COUNT),
    "clusters.iterations": Key(20, COUNT),  # of k-means, at most
    "clusters.train_rows_per_cluster": Key(256, COUNT),  # that k-means looks at, drawn at random
    "clusters.chunk_rows": Key(65_536, COUNT),  # on the devices at a time
    "seed": 0,  # of k-means
    "report_pairs": Key(24, NOT_NEGATIVE),  # pairs of pictures on the page
    "keep_before_damage": False,  # of a tar that is cut off or damaged, scan the pairs before that
}

# Prefix of keys -> files whose comments describe them.
COMMENT_FILES = {
    "": "data_prep/duplicates/config.py data_prep/jobs/failures.py",
    "source.": "diht_jax/readers/*.py",
}


def default_config() -> ml_collections.ConfigDict:
    """Every key, with its default."""
    c = build_config(KEYS)
    c.source = default_source()
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

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
