"""The config of `python -m data_prep.duplicates`: its keys, and their checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from data_prep.duplicates.search import KEEP
from data_prep.jobs.failures import check_job
from data_prep.jobs.workers import RaySettings
from data_prep.sources import default_source
from diht_jax.config.keys import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE_NOT_0,
    Key,
    Range,
    build_config,
    check_ranges,
)

EMBEDDINGS = ("descriptor", "files", "none")
OTHER_CAPTIONS = ("keep", "drop")

KEYS: dict[str, Any] = {
    "input": str,  # any source of docs/guides/prepare/sources.md; None: the keys of the embeddings
    "output": str,  # folder of the table and the report, or a URL
    # What counts as the same input, or "hash", "size"; docs/guides/prepare/shards.md.
    "input_identity": "time",
    "exact": True,  # images of equal bytes are copies
    # "descriptor": colours and shapes at 8 x 8, for copies that were edited; "files": those of
    # `files`; "none": exact copies only.
    "embeddings.kind": "descriptor",
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
    "other_captions": "keep",
    "keep": "farthest",  # from its cluster's centre (SemDeDup), or the "largest" or "first" picture
    "clusters.count": Key(int, COUNT),  # None: by rows_per_cluster; 1 compares all with all
    "clusters.rows_per_cluster": Key(5000, COUNT),  # about
    # Nearest clusters in which each row is compared; more find more.
    "clusters.probes": Key(1, COUNT),
    "clusters.iterations": Key(20, COUNT),  # of k-means, at most
    "clusters.train_rows_per_cluster": Key(256, COUNT),  # that k-means looks at, drawn at random
    "clusters.chunk_rows": Key(65_536, COUNT),  # on the devices at a time
    "seed": 0,  # of k-means
    # Failed units without which the table is made: a share below 1 (0: none; else one at least),
    # or a number.
    "max_failed_shards": 0.01,
    # Scanned inputs that may be gone or replaced, counted in the same way; more are refused.
    "max_changed_shards": 0.01,
    "report_pairs": Key(24, NOT_NEGATIVE),  # pairs of pictures on the page
    "num_workers": int,  # processes; None: one per core, 0: no other process
    "retries": 1,  # how often a task is run again when its worker died, or its storage failed
    # Seconds after which the scan of a unit is stopped; the second time the unit has failed.
    "shard_timeout_secs": Key(float, POSITIVE),
    "keep_before_damage": False,  # of a tar that is cut off or damaged, scan the pairs before that
}

# Prefix of keys -> files whose comments describe them.
COMMENT_FILES = {
    "": "data_prep/duplicates/config.py",
    "ray.": "data_prep/jobs/workers.py",
    "source.": "diht_jax/readers/*.py",
}


def default_config() -> ml_collections.ConfigDict:
    """Every key, with its default."""
    c = build_config(KEYS)
    c.source = default_source()
    c.ray = ml_collections.ConfigDict(dataclasses.asdict(RaySettings()))  # see data_prep.filter
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

    Raises:
        ValueError: a value is out of its range.
    """
    kind = config.embeddings.kind
    for name, value, known in (
        ("embeddings.kind", kind, EMBEDDINGS),
        ("keep", config.keep, KEEP),
        ("other_captions", config.other_captions, OTHER_CAPTIONS),
    ):
        if value not in known:
            raise ValueError(f"config.{name}='{value}'; expected one of {', '.join(known)}")
    check_ranges(config, KEYS)
    check_job(config)
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
