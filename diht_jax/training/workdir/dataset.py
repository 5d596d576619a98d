"""Whether the data are those of the run: on all hosts, and since the checkpoint.

Called by the training loop at its start. How data are compared is `data.fingerprint`'s.
"""

from __future__ import annotations

from typing import Any

import ml_collections
from absl import logging

from diht_jax.data.records.fingerprint import Fingerprint, describe_changes
from diht_jax.training.multihost import gather_texts


def check_hosts_agree(train: Any, fingerprint: Fingerprint) -> None:
    """Refuses hosts that see different data: each would train on another order.

    Args:
        train: `config.data.train`, for the message.
        fingerprint: of what this process sees.

    Raises:
        ValueError: names the processes that differ from the first one.
    """
    digests = gather_texts(fingerprint.digest)
    others = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"config.data.train={train}: processes {', '.join(others)} see other shards than "
            "process 0; give every host the same files"
        )


def check_same_data(
    config: ml_collections.ConfigDict, saved: dict[str, Any] | None, fingerprint: Fingerprint
) -> None:
    """Refuses to go on with other data than the checkpoint's, unless that is allowed.

    Args:
        config: the section `data`.
        saved: what the checkpoint keeps (`Fingerprint.pack`); None in one of an older version.
        fingerprint: of the data now.

    Raises:
        ValueError: names the shards that were changed, are missing or were added.
    """
    if saved is None or saved["digest"] == fingerprint.digest:
        return
    changes = describe_changes(Fingerprint.unpack(saved), fingerprint)
    text = (
        f"config.data.train={config.train} is not what this run was trained on; "
        f"{'; '.join(changes)}"
    )
    if not config.allow_changed:
        raise ValueError(
            f"{text}. Put the old shards back, or go on with these by "
            "--config.data.allow_changed=True: the order of the examples is then another one, and "
            "the epoch at hand is not seen exactly once"
        )
    logging.warning("%s; the run goes on with it", text)
