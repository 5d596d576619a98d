"""What becomes of labels and embeddings when their shards were only touched, or are gone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from absl import logging

from data_prep.jobs import fingerprint, shards
from data_prep.jobs.failures import allowed_number
from diht_jax.storage import files


def keep_touched(tasks: Sequence[Any], what: str) -> None:
    """Keeps what was made of shards of which only the time of change is another.

    Such a shard is known by its name, records, bytes and digest, as by training. Of the others
    there is a warning with their number, since a teacher may have to look at them again.

    Args:
        tasks: with a `shard`, as of `embeddings.EmbeddingTask`; None where it is not known.
        what: they make, for the messages.
    """
    kept = again = 0
    for task, stats, change in shards.check_all(tasks):
        if stats is None or change is None or stats.get("config_hash") != task.config_hash:
            continue
        if task.shard is not None and _shard_of(stats) == [*task.shard]:
            location = fingerprint.describe(task.source, task.identity).location
            fingerprint.write_location(task.location_path, location)
            kept += 1
        else:
            again += 1
    if kept:
        logging.info(
            "%s of %d shards stay, which have another time and the same records", what, kept
        )
    if again:
        logging.warning(
            "%s of %d of %d shards count no more, since these were written again; what is needed "
            "of them is made again",
            what,
            again,
            len(tasks),
        )


def _shard_of(stats: dict[str, Any]) -> list[Any] | None:
    """Name, records, bytes and digest of the shard that something was made of, where known."""
    counts = stats.get("counts", {})
    if "label_file" in counts:
        return [counts["label_file"].get(n) for n in ("name", "records", "num_bytes", "digest")]
    return counts.get("shard")


def remove_gone(tasks: Sequence[shards.ShardTask], limit: float) -> None:
    """Removes what was made of shards that are gone, while they are few; else it is a warning.

    Args:
        tasks: of all shards that are there, in one folder.
        limit: `config.max_changed_shards`.
    """
    folder = os.path.dirname(tasks[0].output)
    own = {os.path.basename(task.output) for task in tasks}
    present = files.list_names(folder)
    endings = (shards.STATS_SUFFIX, shards.FAILED_SUFFIX)
    made = {name.removesuffix(end) for name in present for end in endings if name.endswith(end)}
    gone = made - own
    if len(gone) > allowed_number(limit, len(made)):
        logging.warning(
            "%s holds files of %d shards that config.input no longer names, such as %s; they stay, "
            "since config.max_changed_shards=%g allows %d to be removed",
            folder,
            len(gone),
            min(gone),
            limit,
            allowed_number(limit, len(made)),
        )
        return
    for name in shards.names_below(present, gone):
        files.remove(files.join(folder, name))
    if gone:
        logging.warning("%s: files of %d shards that are gone are removed", folder, len(gone))
