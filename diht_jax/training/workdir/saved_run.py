"""Reading one checkpoint of a run, and saying what is wrong with a damaged one.

Used by `checkpoint`, which chooses among them.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import google_crc32c
import orbax.checkpoint as ocp
from etils import epath

from diht_jax.training.state import TrainState
from diht_jax.training.workdir.checksums import differing_arrays, tree_checksums

# What a checkpoint is made of.
STATE_ITEM, DATA_ITEM, CHECKS_ITEM = "state", "data", "checks"
_LONGEST_CAUSE = 600


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What was read of a checkpoint.

    Attributes:
        state: the training state, its place on the devices as asked for.
        place: in the data, of `TrainIterator.get_state`.
        checks: `state` (of `tree_checksums`), `place` (of `json_checksum`) and `dataset`; empty in
            a checkpoint of an older version.
    """

    state: TrainState
    place: dict[str, int]
    checks: dict[str, Any]


def read_checkpoint(
    directory: epath.Path, target: TrainState
) -> tuple[SavedRun | None, str | None]:
    """This process's part of a checkpoint, or why it cannot be read; the other one is None.

    Orbax's handlers, without the manager's meetings of all processes: one that fails alone must
    not leave the others waiting.
    """
    item = directory / DATA_ITEM
    try:
        json_handler = ocp.JsonCheckpointHandler()
        place = json_handler.restore(item)
        checks = {}
        item = directory / CHECKS_ITEM
        if item.exists():  # checkpoints of an older version have none
            checks = json_handler.restore(item)
            if checks["place"] != json_checksum(place):
                item = directory / DATA_ITEM
                raise ValueError("its contents are not what was saved")
        item = directory / STATE_ITEM
        state = ocp.StandardCheckpointHandler().restore(item, args=ocp.args.StandardRestore(target))
    except Exception as error:  # whatever a damaged file leads to
        return None, f"{item}: {explain_error(error)}"
    return SavedRun(state, place, checks), None


def find_difference(saved: SavedRun) -> str | None:
    """Which values are not those that were saved; None where all are. All processes must call."""
    if "state" not in saved.checks:
        return None
    return _name_differences(saved.checks["state"], saved.state)


def find_difference_in(directory: epath.Path, part: dict[str, Any]) -> str | None:
    """The same of a part of the state, `{"params": ...}`, read from a checkpoint.

    None as well where it has no checksums. All processes must call.
    """
    item = directory / CHECKS_ITEM
    if not item.exists():
        return None
    saved = ocp.JsonCheckpointHandler().restore(item)["state"]
    saved = {path: number for path, number in saved.items() if path.split("/")[0] in part}
    return _name_differences(saved, part)


def _name_differences(saved: dict[str, int], found: Any) -> str | None:
    wrong = differing_arrays(saved, tree_checksums(found))
    return f"values differ from what was saved in {', '.join(wrong[:3])}" if wrong else None


def explain_error(error: BaseException) -> str:
    """The innermost cause in one line: Orbax wraps it in a page of settings."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    # TensorStore adds all its settings to what it says.
    text = " ".join(str(error).split()).split(" [tensorstore_spec=")[0] or type(error).__name__
    return text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]}..."


def json_checksum(value: Any) -> int:
    """CRC32C of a JSON-able value."""
    return google_crc32c.value(json.dumps(value, sort_keys=True).encode())
