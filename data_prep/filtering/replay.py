"""Replays the decisions of a finished folder with other limits, without reading its input.

The files of decisions hold the measurements of every step. The steps decide again from these
columns, in order, with the same `decide` as in the filter. A pair whose outcome needs a missing
measurement is counted as not known. For example, the text in an image was never read if the caption
was dropped first. All other outcomes are exactly those of the filter.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np
import pyarrow

from data_prep.decisions import table
from data_prep.decisions.report import Funnel
from data_prep.filtering import config as filter_config
from data_prep.filtering.config import score_quantiles
from data_prep.jobs import shards
from data_prep.reports.page import format_funnel
from data_prep.steps import registry
from data_prep.steps.base import Columns
from diht_jax.storage import files

DROPPED_FILE = "dropped.tsv"  # one line per dropped pair: its key, and "stage/reason"
NOT_KNOWN_FILE = "not_known.txt"  # keys of the pairs that would have to be filtered
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)

_NOT_KNOWN = "not known"
_NO_DECISION_COLUMNS = ("key", "uid", "label", "words", "format", "looked")
_NO_DECISION_COLUMNS += ("object_names", "action_names")

Outcome = tuple[str, str | None]


@dataclasses.dataclass
class Result:
    """Outcomes of a replay.

    Attributes:
        funnel: counts of the pairs whose outcome is known; `read` counts all pairs.
        not_known: step at which the outcome is not known -> number of pairs.
        changes: the settings that differ from those of the folder.
        scores: name -> its quantiles at `QUANTILES` over all pairs that have the score.
    """

    funnel: Funnel
    not_known: collections.Counter[str]
    changes: list[str]
    scores: dict[str, list[float]]

    def format_table(self) -> str:
        """Formats the changes, the funnel and the unknown outcomes as text."""
        lines = [f"settings: {', '.join(self.changes) or 'those of the folder'}"]
        lines.append(format_funnel(self.funnel.rows()))
        if total := self.not_known.total():
            steps = ", ".join(f"{count:,} at {step}" for step, count in self.not_known.items())
            lines.append(f"not known: {total:,} pairs would have to be filtered ({steps})")
        if self.scores:
            width = max(map(len, self.scores))
            lines.append(f"{'':{width}}" + "".join(f" {share:>9.0%}" for share in QUANTILES))
        for name, values in self.scores.items():
            lines.append(f"{name:{width}}" + "".join(f" {value:>9.4g}" for value in values))
        return "\n".join(lines)


class Replay:
    """Decides about the pairs of a finished folder with other limits."""

    def __init__(self, folder: str, config: ml_collections.ConfigDict | None = None):
        """Finds the decisions of a folder; `config` defaults to the config of the folder.

        Raises:
            ValueError: the folder is not finished.
        """
        self._folder = folder
        outputs, stats = table.find_outputs(folder, "--replay")
        self.paths = list(map(table.decisions_path, outputs))
        self._pairs = stats["counts"]["read"]
        self._before = _restore_config(stats["config"])
        self._now = self._before if config is None else config
        self._was_active = registry.active_steps(self._before)
        self._steps = registry.active_steps(self._now)
        order = [table.SOURCE, *(step.name for step in registry.ordered_steps()), table.KEPT]
        self._rank = {stage: rank for rank, stage in enumerate(order)}
        self._codes: dict[Outcome, int] = {(table.KEPT, None): 0}

    def run(self, folder: str | None = None) -> Result:
        """Decides about all pairs.

        Args:
            folder: where to write lists of kept, dropped and unknown pairs; None writes none.

        Raises:
            ValueError: files are missing or damaged, or `folder` has the lists of a filter.
        """
        if folder is not None and files.exists(files.join(folder, shards.MERGED_STATS)):
            raise ValueError(
                f"--lists='{folder}': a filter has written its own lists there, of the records; "
                "expected another folder"
            )
        counts: collections.Counter[int] = collections.Counter()
        scores = [name for step in self._was_active for name in step.scores]
        columns = table.make_schema(scores).names
        if folder is None:
            columns = [name for name in columns if name not in _NO_DECISION_COLUMNS]

        def decide_all() -> Iterator[tuple[pyarrow.RecordBatch, np.ndarray]]:
            for path in self.paths:
                for rows in table.read_decisions(path, columns):
                    codes = self._decide(rows)
                    counts.update(dict(enumerate(np.bincount(codes).tolist())))
                    yield rows, codes

        if folder is None:
            collections.deque(decide_all(), maxlen=0)
        else:
            self._write_lists(folder, decide_all())
        if counts.total() != self._pairs:
            raise ValueError(
                f"--replay='{self._folder}': {len(self.paths)} files of decisions hold "
                f"{counts.total():,} pairs, and the job has read {self._pairs:,}; some are "
                "missing: run the same filter once more"
            )
        not_known, known = collections.Counter[str](), {}
        for (stage, reason), code in self._codes.items():
            if stage == _NOT_KNOWN:
                not_known[str(reason)] = counts[code]
            elif counts[code] or stage == table.KEPT:
                known[stage, reason] = counts[code]
        before, now = map(filter_config.record_settings, (self._before, self._now))
        shown = [name for step in self._steps for name in step.scores if name in scores]
        quantiles = {name: score_quantiles(self.paths, name, QUANTILES) for name in shown}
        return Result(
            Funnel(known, read=counts.total()),
            +not_known,
            list(filter_config.compare_settings(before, now)),
            {name: values for name, values in quantiles.items() if values is not None},
        )

    def decide(self, rows: pyarrow.RecordBatch) -> list[Outcome]:
        """Returns the outcome of each row: stage and reason, or "not known" and the step."""
        codes, names = self._decide(rows).tolist(), list(self._codes)
        return [names[code] for code in codes]

    def _decide(self, rows: pyarrow.RecordBatch) -> np.ndarray:
        """Returns the outcomes of some rows as indices into `_codes`, int64 [n]."""
        columns = Columns(dict(zip(rows.schema.names, rows.columns, strict=True)), len(rows))
        rank = np.zeros(len(rows), np.int64)  # of the stage at which the filter ended each pair
        for stage, holds in columns.texts("outcome").items():
            if stage not in self._rank:
                raise ValueError(f"the folder was filtered with a step '{stage}' that is not here")
            rank[holds] = self._rank[stage]
        result = np.full(len(rows), -1)

        def settle(stage: str, reason: str | None, holds: np.ndarray | bool) -> None:
            chosen = (result < 0) & holds
            if chosen.any():
                result[chosen] = self._codes.setdefault((stage, reason), len(self._codes))

        for reason, holds in columns.reasons(table.SOURCE).items():
            settle(table.SOURCE, reason, holds)
        for step in self._steps:
            if step not in self._was_active:
                settle(_NOT_KNOWN, step.name, True)
                break
            is_unknown = step.find_unknown(columns, self._before, self._now)
            settle(_NOT_KNOWN, step.name, is_unknown | (rank < self._rank[step.name]))
            for reason, holds in step.decide(columns, self._now).items():
                settle(step.name, reason, holds)
        settle(table.KEPT, None, True)
        return result

    def _write_lists(
        self, folder: str, decided: Iterator[tuple[pyarrow.RecordBatch, np.ndarray]]
    ) -> None:
        files.make_folder(folder)
        with (
            files.local_output(files.join(folder, DROPPED_FILE)) as dropped_path,
            files.local_output(files.join(folder, NOT_KNOWN_FILE)) as unknown_path,
            open(dropped_path, "wb") as dropped,
            open(unknown_path, "wb") as unknown,
        ):

            def write_others() -> Iterator[pyarrow.RecordBatch]:
                for rows, codes in decided:
                    names = pyarrow.array([f"{stage}/{reason}" for stage, reason in self._codes])
                    is_unknown = np.array([stage == _NOT_KNOWN for stage, _ in self._codes])[codes]
                    is_dropped = ~is_unknown & (codes != self._codes[table.KEPT, None])
                    drops = rows["key"].filter(pyarrow.array(is_dropped))
                    outcomes = names.take(pyarrow.array(codes[is_dropped]))
                    table.write_lines(dropped, drops, outcomes)
                    table.write_lines(unknown, rows["key"].filter(pyarrow.array(is_unknown)))
                    yield rows.filter(pyarrow.array(codes == self._codes[table.KEPT, None]))

            table.write_lists(folder, write_others())


def _restore_config(settings: dict[str, Any]) -> ml_collections.ConfigDict:
    """Restores the config of a folder; keys that were not recorded get their defaults."""

    def as_tuple(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    config = filter_config.default_config()
    for name, value in settings.items():
        if isinstance(value, dict):
            known = {key: kept for key, kept in value.items() if key in config.get(name, {})}
            config[name].update({key: as_tuple(kept) for key, kept in known.items()})
        elif name in config:
            config[name] = as_tuple(value)
    return config
