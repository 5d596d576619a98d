"""Decides anew by other limits what a finished folder has decided, without reading its input.

The decisions of a folder (`decisions`) hold what the steps measured of every pair. Each step
decides from them again, in order, and a pair for which more would have to be known, such as the
text in the picture of a pair whose caption was not good enough then, is counted as not known.
Nothing is guessed: of all other pairs the filter itself would decide the same.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
import pyarrow

from data_prep.filtering import config as filter_config
from data_prep.filtering import decisions, kept, resharding
from data_prep.filtering.score_quantiles import score_quantiles
from data_prep.filtering.stale_outputs import SETTINGS, compare_settings
from data_prep.jobs import manifest, shards
from data_prep.reports.funnel import KEPT, SOURCE, Funnel
from data_prep.steps import clip, models, recorded, registry
from diht_jax.records.escaping import escape_lines
from diht_jax.storage import files
from diht_jax.storage.retries import StorageError

DROPPED_FILE = "dropped.tsv"  # a line for each dropped pair: its key, and "stage/reason"
NOT_KNOWN_FILE = "not_known.txt"  # keys of the pairs that would have to be filtered

_NOT_KNOWN = "not known"
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_AHEAD = 4  # files that are read before they are needed

Outcome = tuple[str, str | None]


@dataclasses.dataclass
class Result:
    """What a replay has decided.

    Attributes:
        funnel: of the pairs that are known; `read` counts all.
        not_known: step at which it is not known how the pair ends -> pairs.
        changes: the settings that differ from those of the folder.
        scores: name -> its quantiles at `QUANTILES`, of all pairs that have the score.
    """

    funnel: Funnel
    not_known: collections.Counter[str]
    changes: list[str]
    scores: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def format_table(self) -> str:
        """The changes, the funnel and what is not known, for people."""
        lines = [f"settings: {', '.join(self.changes) or 'those of the folder'}"]
        lines.append(self.funnel.format_table())
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
    """A finished folder, and the limits by which its pairs are decided anew."""

    def __init__(self, folder: str, config: ml_collections.ConfigDict | None = None):
        """Finds the decisions of a folder.

        Args:
            folder: output of a finished job of `data_prep.filter`.
            config: of `config.default_config`; None for that of the folder.

        Raises:
            ValueError: the folder is not finished, or was filtered before decisions were recorded.
        """
        self.paths, stats = _find_decisions(folder)
        self._pairs = stats["counts"]["read"]
        self._before = _restore_config(stats["config"])
        self._now = self._before if config is None else config
        was_active = registry.active_steps(self._before)
        scores = [name for step in was_active for name in step.scores]
        self._columns = decisions.make_schema(scores).names
        self._steps = [(step, step in was_active) for step in registry.active_steps(self._now)]
        order = [SOURCE, *(step.name for step in registry.ordered_steps()), decisions.KEPT]
        self._rank = {stage: rank for rank, stage in enumerate(order)}
        self._outcomes: list[Outcome] = [(KEPT, None), (_NOT_KNOWN, None)]
        self._codes = {outcome: code for code, outcome in enumerate(self._outcomes)}

    def run(self, lists: str | None = None) -> Result:
        """Decides about all pairs.

        Args:
            lists: folder for the lists of kept, dropped and unknown pairs; None writes none.

        Raises:
            ValueError: files are missing or damaged.
        """
        counts: collections.Counter[Outcome] = collections.Counter()
        if lists is None:
            columns = [name for name in self._columns if name not in ("key", "uid")]
            for _, codes in self._decide_all(columns):
                self._count(codes, counts)
        else:
            files.make_folder(lists)
            self._write_lists(lists, counts)
        if counts.total() != self._pairs:
            raise ValueError(
                f"{len(self.paths)} files of decisions hold {counts.total():,} pairs, and the job "
                f"has read {self._pairs:,}; some are missing: run the same filter once more"
            )
        return self._describe(counts)

    def decide(self, rows: pyarrow.RecordBatch) -> np.ndarray:
        """The outcomes of some rows, as numbers of `outcomes`, int64 [n]."""
        pairs = recorded.Recorded(rows)
        then, rank = self._read_outcomes(pairs)
        result = np.where(rank == self._rank[SOURCE], then, -1)
        for step, was_active in self._steps:
            is_open = result < 0
            if not was_active:
                result[is_open] = self._code(_NOT_KNOWN, step.name)
                break
            answers = step.replay(pairs, self._before, self._now)
            own, as_recorded = self._rank[step.name], answers == recorded.AS_RECORDED
            is_unknown = (answers == recorded.NOT_KNOWN) | (as_recorded & (rank < own))
            result[is_open & is_unknown] = self._code(_NOT_KNOWN, step.name)
            as_then = is_open & as_recorded & (rank == own)
            result[as_then] = then[as_then]
            for number, reason in enumerate(step.reasons, 1):
                drops = is_open & (answers == number)
                if drops.any():
                    result[drops] = self._code(step.name, reason)
        result[result < 0] = self._code(KEPT, None)
        return result

    def outcome(self, code: int) -> Outcome:
        """Stage and reason of a number; of a pair that is not known "not known" and the step."""
        return self._outcomes[code]

    def _code(self, stage: str, reason: str | None) -> int:
        code = self._codes.setdefault((stage, reason), len(self._outcomes))
        if code == len(self._outcomes):
            self._outcomes.append((stage, reason))
        return code

    def _read_outcomes(self, pairs: recorded.Recorded) -> tuple[np.ndarray, np.ndarray]:
        """How each pair ended then: the number of the outcome, and the rank of the stage."""
        stages, reasons = pairs.texts("outcome"), pairs.texts("reason")
        unknown = [stage for stage in stages if stage not in self._rank]
        if unknown:
            raise ValueError(f"the folder was filtered with a step '{unknown[0]}' that is not here")
        ranks = np.array([self._rank[stage] for stage in stages], np.int64)
        joint = pairs.codes("outcome") * (len(reasons) + 1) + pairs.codes("reason") + 1
        found, inverse = np.unique(joint, return_inverse=True)
        codes = []
        for pair in found.tolist():
            stage, reason = divmod(pair, len(reasons) + 1)
            codes.append(self._code(stages[stage], [None, *reasons][reason]))
        return np.array(codes, np.int64)[inverse], ranks[pairs.codes("outcome")]

    def _decide_all(
        self, columns: Sequence[str]
    ) -> Iterator[tuple[pyarrow.RecordBatch, np.ndarray]]:
        """All rows in order with their outcomes; the next files are read at the same time."""

        def read(path: str) -> list[pyarrow.RecordBatch]:
            return list(decisions.read_decisions(path, columns))

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            paths = iter(self.paths)
            waiting = collections.deque(
                pool.submit(read, p) for p in itertools.islice(paths, _AHEAD)
            )
            while waiting:
                batches = waiting.popleft().result()
                waiting.extend(pool.submit(read, path) for path in itertools.islice(paths, 1))
                for rows in batches:
                    yield rows, self.decide(rows)

    def _count(self, codes: np.ndarray, counts: collections.Counter[Outcome]) -> None:
        found = np.bincount(codes)
        counts.update({self._outcomes[i]: int(found[i]) for i in np.flatnonzero(found)})

    def _write_lists(self, folder: str, counts: collections.Counter[Outcome]) -> None:
        with contextlib.ExitStack() as stack:
            dropped, unknown = (
                stack.enter_context(
                    open(stack.enter_context(files.local_output(files.join(folder, name))), "wb")
                )
                for name in (DROPPED_FILE, NOT_KNOWN_FILE)
            )

            def decide() -> Iterator[kept.KeptPairs]:
                for rows, codes in self._decide_all(self._columns):
                    self._count(codes, counts)
                    names = pyarrow.array([f"{stage}/{reason}" for stage, reason in self._outcomes])
                    is_unknown = np.array([stage == _NOT_KNOWN for stage, _ in self._outcomes])
                    is_dropped = ~is_unknown[codes] & (codes != 0)
                    drops = pyarrow.array(is_dropped)
                    kept.write_lines(
                        dropped,
                        rows["key"].filter(drops),
                        names.take(pyarrow.array(codes[is_dropped])),
                    )
                    kept.write_lines(unknown, rows["key"].filter(pyarrow.array(is_unknown[codes])))
                    some = rows.filter(pyarrow.array(codes == 0))
                    yield kept.KeptPairs(some["key"], some["uid"], some["format"])

            kept.write_lists(folder, decide())

    def _describe(self, counts: collections.Counter[Outcome]) -> Result:
        funnel = Funnel(read=counts.total(), kept=counts[KEPT, None])
        not_known: collections.Counter[str] = collections.Counter()
        for (stage, reason), pairs in counts.items():
            if stage == _NOT_KNOWN:
                not_known[reason] += pairs
            elif stage != KEPT:
                funnel.dropped.setdefault(stage, collections.Counter())[reason] += pairs
        names = [name for step, _ in self._steps for name in step.scores]
        found = {n: score_quantiles(self.paths, n, QUANTILES) for n in names if self._has(n)}
        scores = {name: values for name, values in found.items() if values is not None}
        changes = compare_settings(
            *(
                json.loads(json.dumps(filter_config.record_settings(config)))
                for config in (self._before, self._now)
            )
        )
        return Result(funnel, not_known, list(changes), scores)

    def _has(self, score: str) -> bool:
        return any(score in step.scores for step in registry.active_steps(self._before))


def set_quantile_limit(config: ml_collections.ConfigDict) -> None:
    """Makes of `config.clip.quantile` the limit `config.clip.min_score`, in place; else nothing.

    Args:
        config: its `clip.scores` is a finished folder whose decisions have the score.

    Raises:
        ValueError: the folder is not finished, or has no scores, or those of another model.
    """
    c = config.clip
    if c.quantile is None:
        return
    paths, stats = _find_decisions(c.scores, "config.clip.scores")
    try:
        found = score_quantiles(paths, clip.SCORE, [c.quantile])
    except KeyError:
        found = None  # the step was not active
    if found is None:
        raise ValueError(
            f"config.clip.scores='{c.scores}': no pair has a score; filter into that folder with "
            "config.clip.model first"
        )
    _check_model(config, stats["config"]["clip"]["model"])
    c.min_score = found[0]


def _check_model(config: ml_collections.ConfigDict, scored_by: str) -> None:
    """Refuses the scores of a model that is another one than `config.clip.model`.

    A model is known by its files; where they are not here, or were not recorded, by its name.
    """
    c = config.clip
    settings = [
        files.read_object(files.join(c.scores, *below, SETTINGS)) or {}
        for below in ((resharding.PARTS,), ())
    ]
    before = next((known["clip_model"] for known in settings if "clip_model" in known), None)
    now = None
    with contextlib.suppress(ValueError):
        now = models.fingerprint(c.model, "config.clip.model")
    is_known = before is not None and now is not None
    if before != now if is_known else scored_by != c.model:
        other = "with other files" if scored_by == c.model else "another model"
        raise ValueError(
            f"config.clip.scores='{c.scores}' has the scores of config.clip.model='{scored_by}', "
            f"and config.clip.model='{c.model}' is {other}: expected scores of the same model; "
            "filter into a folder with this model first, and name that folder"
        )


def run(folder: str, config: ml_collections.ConfigDict | None, lists: str | None) -> Result:
    """Replays a folder and prints what comes of it; arguments of `Replay`."""
    replay = Replay(folder, config)
    result = replay.run(lists)
    print(escape_lines(result.format_table()))
    return result


def _find_decisions(folder: str, named: str = "--replay") -> tuple[list[str], dict[str, Any]]:
    try:
        stats = json.loads(files.read_bytes(files.join(folder, shards.MERGED_STATS)))
        stats["config"], stats["counts"]["read"]
    except StorageError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{named}='{folder}': no finished folder of `python -m data_prep.filter` "
            f"({type(error).__name__}: {error}); run the filter to its end first"
        ) from error
    for where, suffix in (
        (files.join(folder, "parts"), decisions.SUFFIX),
        (files.join(folder, decisions.FOLDER), ".parquet"),
        (folder, decisions.SUFFIX),
    ):
        names = {name: None for name in files.list_names(where) if name.endswith(suffix)}
        # Parts stand in the order of their inputs, not in that of their names.
        ordered = [entry.name + suffix for entry in manifest.read_manifest(where)]
        names = [name for name in ordered or names if name in names]
        if names:
            return [files.join(where, name) for name in names], stats
    raise ValueError(
        f"{named}='{folder}': no decisions; it was filtered before they were recorded. Filter it "
        "again with --overwrite"
    )


def _restore_config(settings: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config by which a folder was filtered; keys that are newer have their defaults."""
    config = filter_config.default_config()
    for name, value in settings.items():
        if isinstance(value, dict):
            known = {key: kept for key, kept in value.items() if key in config.get(name, {})}
            config[name].update({key: _as_tuple(kept) for key, kept in known.items()})
        elif name in config:
            config[name] = _as_tuple(value)
    return config


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
