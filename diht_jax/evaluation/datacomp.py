"""`datacomp:DIR`: the tasks in the folder that DataComp's `download_evalsets.py` fills."""

from __future__ import annotations

from absl import logging

from diht_jax.evaluation.benchmark_names import DATACOMP, datacomp_folder, datacomp_source
from diht_jax.evaluation.sources.pictures import join
from diht_jax.storage.files import exists

_PREFIX = "datacomp:"


def expand(text: str) -> list[str]:
    """The tasks of "datacomp:DIR" whose folders are there, as texts of `parse_tasks`.

    Any other text is the only one of its list.

    Raises:
        ValueError: no folder is there.
    """
    if not text.startswith(_PREFIX):
        return [text]
    root = text.removeprefix(_PREFIX)
    texts, missing = [], []
    for theirs, ours in DATACOMP.items():
        folder = join(root, datacomp_folder(theirs))
        source = datacomp_source(theirs, folder)
        is_csv = source.endswith(".csv")
        if exists(source if is_csv else join(folder, "test", "nshards.txt")):
            texts.append(f"{ours}={source}")
        else:
            missing.append(datacomp_folder(theirs))
    if not texts:
        raise ValueError(
            f"task '{text}': none of DataComp's folders is in '{root}', such as {missing[0]}; "
            "expected what its download_evalsets.py writes (options belong to single tasks)"
        )
    if missing:
        logging.warning("%s: %d folders are missing: %s", text, len(missing), ", ".join(missing))
    return texts
