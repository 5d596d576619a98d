"""The config of `python -m data_prep.duplicates`: its keys, and their checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.duplicates.semdedup import KEEP
from data_prep.jobs.engine import RaySettings
from data_prep.jobs.failures import check_limit
from data_prep.jobs.fingerprint import check_identity
from data_prep.sources.list import default_source

EMBEDDINGS = ("descriptor", "files", "none")
# Keys that decide where and how fast, but not what is found.
_NOT_RECORDED = (
    *("input", "output", "num_workers", "retries", "ray", "report_pairs"),
    *("input_identity", "max_failed_shards", "max_changed_shards", "shard_timeout_secs"),
    "keep_before_damage",
)


def default_config() -> ml_collections.ConfigDict:
    """Every key, with its default."""
    c = ml_collections.ConfigDict()
    c.input = placeholder(str)  # any source of docs/data.md; None: the keys of the embeddings
    c.output = placeholder(str)  # folder of the table and the report, or a URL
    c.source = default_source()
    c.input_identity = "time"  # what counts as the same input, or "hash", "size"; docs/filter.md

    c.exact = True  # images of equal bytes are copies
    c.embeddings = ml_collections.ConfigDict()
    # "descriptor": colours and shapes at 8 x 8, for copies that were edited; "files": those of
    # `files`; "none": exact copies only.
    c.embeddings.kind = "descriptor"
    c.embeddings.mirrored = True  # of the descriptor: a picture and its mirror image are alike
    # With an input the --output of diht_jax.embed on the same input. Without one a glob of .npz or
    # .parquet files with "key" and "image_emb", by whomever. Paths or URLs.
    c.embeddings.files = placeholder(str)

    c.threshold = 0.95  # cosine from which two pictures are near-duplicates, or are verified
    c.verify = ml_collections.ConfigDict()
    # Of pictures that the cosine finds those are copies whose thumbnails have this correlation when
    # one is laid over the other, or over a part of it (0.95 finds crops); None: all of them are.
    c.verify.correlation = placeholder(float)
    c.verify.candidates = 8  # pictures of the highest cosines that each one is compared with
    c.keep = "farthest"  # from its cluster's centre (SemDeDup), or the "largest" or "first" picture
    c.clusters = ml_collections.ConfigDict()
    c.clusters.count = placeholder(int)  # None: by rows_per_cluster; 1 compares all with all
    c.clusters.rows_per_cluster = 5000
    c.clusters.probes = 1  # nearest clusters in which each row is compared; more find more
    c.clusters.iterations = 20  # of k-means, at most
    c.clusters.train_rows_per_cluster = 256  # that k-means looks at, drawn at random
    c.clusters.chunk_rows = 65_536  # on the devices at a time
    c.seed = 0

    # Failed units without which the table is made: a share below 1 (0: none; else one at least),
    # or a number.
    c.max_failed_shards = 0.01
    # Scanned inputs that may be gone or replaced, as a share or a number; more are refused.
    c.max_changed_shards = 0.01
    c.report_pairs = 24  # pairs of pictures on the page
    c.num_workers = placeholder(int)  # processes; None: one per core, 0: no other process
    c.retries = 1  # how often a task is run again when its worker died, or its storage failed
    # Seconds after which the scan of a unit is stopped; the second time the unit has failed.
    c.shard_timeout_secs = placeholder(float)
    c.keep_before_damage = False  # of a tar that is cut off or damaged, scan the pairs before that
    c.ray = ml_collections.ConfigDict(dataclasses.asdict(RaySettings()))  # see data_prep.filter
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

    Raises:
        ValueError: a value is out of its range.
    """
    kind = config.embeddings.kind
    for name, value, known in (("embeddings.kind", kind, EMBEDDINGS), ("keep", config.keep, KEEP)):
        if value not in known:
            raise ValueError(f"config.{name}='{value}'; expected one of {', '.join(known)}")
    if not -1 <= config.threshold <= 1:
        raise ValueError(f"config.threshold={config.threshold}; expected a cosine, from -1 to 1")
    least = {f"clusters.{n}": v for n, v in config.clusters.items() if v is not None}
    least |= {"report_pairs": config.report_pairs + 1}
    for name, value in (least | {"verify.candidates": config.verify.candidates}).items():
        if value < 1:
            raise ValueError(f"config.{name}={value}; expected at least 1")
    if (kind == "files") != (config.embeddings.files is not None):
        raise ValueError("config.embeddings.files goes with config.embeddings.kind='files'")
    if config.input is None and kind != "files":
        raise ValueError(
            "config.input is not set: expected pairs, or config.embeddings.kind='files' with "
            "config.embeddings.files"
        )
    correlation = config.verify.correlation
    if correlation is not None and not 0 < correlation <= 1:
        raise ValueError(
            f"config.verify.correlation={correlation}; expected more than 0, at most 1"
        )
    if correlation is not None and config.input is None:
        raise ValueError("config.verify.correlation needs config.input, to see the pictures")
    RaySettings(**config.ray.to_dict()).check()
    check_identity(config.input_identity)
    for name in ("max_failed_shards", "max_changed_shards"):
        check_limit(name, config[name])
    if config.shard_timeout_secs is not None and config.shard_timeout_secs <= 0:
        raise ValueError(
            f"config.shard_timeout_secs={config.shard_timeout_secs}; expected more than 0"
        )
    if config.input is None and config.keep == "largest":
        raise ValueError("config.keep='largest' needs config.input, to know the pictures' sizes")
    if kind == "none" and not config.exact:
        raise ValueError("config.embeddings.kind='none' with config.exact=False finds nothing")


def record_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The part of the config that decides what is found, JSON-able."""
    return {k: v for k, v in config.to_dict().items() if k not in _NOT_RECORDED}
