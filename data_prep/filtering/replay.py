"""Decides anew by other limits what a finished folder has decided, without reading its input.

Decisions hold what the steps have measured of every pair. The steps decide from these columns
again, in order, by the same `decide` as in the filter. A pair for which more would have to be
known, such as the text in the picture of a pair whose caption was not good enough then, is counted
as not known. Nothing is guessed: of all other pairs the filter itself would decide the same.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
import pyarrow

from data_prep.decisions import table
from data_prep.decisions.funnel import Funnel
from data_prep.decisions.table import KEPT, SOURCE, find_decisions, make_schema, read_decisions
from data_prep.filtering import config as filter_config
from data_prep.steps import clip, heads, models, registry
from data_prep.steps.base import Columns
from diht_jax.storage import files
from diht_jax.terminal import print_escaped

DROPPED_FILE = "dropped.tsv"  # a line for each dropped pair: its key, and "stage/reason"
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
        funnel: of the pairs that are known; `read` counts all.
        not_known: step at which it is not known how the pair ends -> pairs.
        changes: the settings that differ from those of the folder.
        scores: name -> its quantiles at `QUANTILES`, of all pairs that have the score.
    """

    funnel: Funnel
    not_known: collections.Counter[str]
    changes: list[str]
    scores: dict[str, list[float]]

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
            config: of `filtering.config.default_config`; None for that of the folder.

        Raises:
            ValueError: the folder is not finished.
        """
        self.paths, stats = find_decisions(folder, "--replay")
        self._pairs = stats["counts"]["read"]
        self._before = _restore_config(stats["config"])
        self._now = self._before if config is None else config
        self._was_active = registry.active_steps(self._before)
        self._steps = registry.active_steps(self._now)
        self._scores = [name for step in self._was_active for name in step.scores]
        asked = [name for step in self._steps for name in step.scores]
        self._shown_scores = [name for name in asked if name in self._scores]
        order = [SOURCE, *(step.name for step in registry.ordered_steps()), KEPT]
        self._rank = {stage: rank for rank, stage in enumerate(order)}
        self._codes: dict[Outcome, int] = {(KEPT, None): 0}

    def run(self, folder: str | None = None) -> Result:
        """Decides about all pairs.

        Args:
            folder: for the lists of kept, dropped and unknown pairs; None writes none.

        Raises:
            ValueError: files are missing or damaged.
        """
        counts: collections.Counter[int] = collections.Counter()
        columns = make_schema(self._scores).names
        if folder is None:
            columns = [name for name in columns if name not in _NO_DECISION_COLUMNS]

        def decide_all() -> Iterator[tuple[pyarrow.RecordBatch, np.ndarray]]:
            for path in self.paths:
                for rows in read_decisions(path, columns):
                    codes = self._decide(rows)
                    counts.update(dict(enumerate(np.bincount(codes).tolist())))
                    yield rows, codes

        if folder is None:
            collections.deque(decide_all(), maxlen=0)
        else:
            files.make_folder(folder)
            self._write_lists(folder, decide_all())
        if counts.total() != self._pairs:
            raise ValueError(
                f"{len(self.paths)} files of decisions hold {counts.total():,} pairs, and the job "
                f"has read {self._pairs:,}; some are missing: run the same filter once more"
            )
        return self._describe({outcome: counts[code] for outcome, code in self._codes.items()})

    def decide(self, rows: pyarrow.RecordBatch) -> list[Outcome]:
        """Outcomes of some pairs: stage and reason, or "not known" and the step."""
        codes, names = self._decide(rows).tolist(), list(self._codes)
        return [names[code] for code in codes]

    def _decide(self, rows: pyarrow.RecordBatch) -> np.ndarray:
        """The outcomes of some rows as numbers of `_codes`, int64 [n]."""
        columns = Columns(dict(zip(rows.schema.names, rows.columns, strict=True)), len(rows))
        rank = self._read_ranks(columns)
        result = np.full(len(rows), -1)
        for reason, holds in columns.reasons(SOURCE).items():
            result[holds] = self._code(SOURCE, reason)
        for step in self._steps:
            is_open = result < 0
            if step not in self._was_active:
                result[is_open] = self._code(_NOT_KNOWN, step.name)
                break
            is_unknown = step.find_unknown(columns, self._before, self._now)
            is_unknown |= rank < self._rank[step.name]
            result[is_open & is_unknown] = self._code(_NOT_KNOWN, step.name)
            for reason, holds in step.decide(columns, self._now).items():
                drops = (result < 0) & holds
                if drops.any():
                    result[drops] = self._code(step.name, reason)
        result[result < 0] = self._code(KEPT, None)
        return result

    def _code(self, stage: str, reason: str | None) -> int:
        return self._codes.setdefault((stage, reason), len(self._codes))

    def _read_ranks(self, columns: Columns) -> np.ndarray:
        """Rank of the stage at which each pair ended then, int64 [n]."""
        stages, codes = columns.codes("outcome")
        unknown = [stage for stage in stages if stage not in self._rank]
        if unknown:
            raise ValueError(f"the folder was filtered with a step '{unknown[0]}' that is not here")
        return np.array([self._rank[stage] for stage in stages], np.int64)[codes]

    def _write_lists(
        self, folder: str, decided: Iterator[tuple[pyarrow.RecordBatch, np.ndarray]]
    ) -> None:
        with (
            files.local_output(files.join(folder, DROPPED_FILE)) as dropped_path,
            files.local_output(files.join(folder, NOT_KNOWN_FILE)) as unknown_path,
            open(dropped_path, "wb") as dropped,
            open(unknown_path, "wb") as unknown,
        ):
            kept = self._code(KEPT, None)

            def write_others() -> Iterator[pyarrow.RecordBatch]:
                for rows, codes in decided:
                    names = pyarrow.array([f"{stage}/{reason}" for stage, reason in self._codes])
                    is_unknown = np.array([stage == _NOT_KNOWN for stage, _ in self._codes])[codes]
                    is_dropped = ~is_unknown & (codes != kept)
                    drops = rows["key"].filter(pyarrow.array(is_dropped))
                    outcomes = names.take(pyarrow.array(codes[is_dropped]))
                    table.write_lines(dropped, drops, outcomes)
                    table.write_lines(unknown, rows["key"].filter(pyarrow.array(is_unknown)))
                    yield rows.filter(pyarrow.array(codes == kept))

            table.write_lists(folder, write_others())

    def _describe(self, counts: dict[Outcome, int]) -> Result:
        not_known = {
            step: n for (stage, step), n in counts.items() if step and stage == _NOT_KNOWN and n
        }
        known = {o: n for o, n in counts.items() if o[0] != _NOT_KNOWN and (n or o[0] == KEPT)}
        found = {name: score_quantiles(self.paths, name, QUANTILES) for name in self._shown_scores}
        before, now = (
            json.loads(json.dumps(filter_config.record_settings(config)))
            for config in (self._before, self._now)
        )
        return Result(
            Funnel(known, read=sum(counts.values())),
            collections.Counter(not_known),
            list(filter_config.compare_settings(before, now)),
            {name: values for name, values in found.items() if values is not None},
        )


def score_quantiles(paths: Sequence[str], name: str, shares: Sequence[float]) -> list[float] | None:
    """The least scores that are as high as a share of all; held are 4 bytes for each pair.

    Args:
        paths: files of decisions.
        name: of the score.
        shares: in [0, 1].

    Returns:
        For each share the value of `numpy.quantile` with method "inverted_cdf", of the pairs
        that have the score; None where none has.
    """
    found = [rows[name].drop_null().to_numpy() for p in paths for rows in read_decisions(p, [name])]
    values = np.concatenate(found) if found else np.zeros(0, np.float32)
    values = values[~np.isnan(values)]
    return np.quantile(values, shares, method="inverted_cdf").tolist() if len(values) else None


def set_quantile_limit(config: ml_collections.ConfigDict) -> None:
    """Makes limits of the quantiles of steps, in place.

    Of `config.clip.quantile` comes `config.clip.min_score`; of that of a linear head its `limit`.

    Args:
        config: `scores` of such a step is a finished folder whose decisions have the score.

    Raises:
        ValueError: the folder is not finished, or has no scores, or those of another model.
    """
    if config.clip.quantile is not None:
        (score,), stats = _limit_from_scores(config, "clip", clip.SCORE, config.clip.quantile)
        _check_model(config, stats["config"]["clip"]["model"])
        config.clip.min_score = score
    for step in registry.ordered_steps():
        if not issubclass(step, heads.HeadStep):
            continue
        c = config[step.name]
        if c.quantile is None:
            continue
        share = 1 - c.quantile if step.drops_high else c.quantile
        (score,), _ = _limit_from_scores(config, step.name, step.score_name(), share)
        _check_head(step, config)
        c.limit = score


def _limit_from_scores(
    config: ml_collections.ConfigDict, section: str, name: str, share: float
) -> tuple[list[float], dict[str, Any]]:
    """The quantile of the scores in the folder that a section names, and its statistics."""
    folder, key = config[section].scores, f"config.{section}.scores"
    paths, stats = find_decisions(folder, key)
    try:
        found = score_quantiles(paths, name, [share])
    except KeyError:
        found = None  # the step was not active
    if found is None:
        model = "model" if section == "clip" else "head"
        raise ValueError(
            f"{key}='{folder}': no pair has a score; filter into that folder with "
            f"config.{section}.{model} first"
        )
    return found, stats


def _check_head(step: type[heads.HeadStep], config: ml_collections.ConfigDict) -> None:
    """Refuses the scores of another head, or of other embeddings."""
    c = config[step.name]
    settings = _recorded_settings(c.scores)
    now = step.describe_rules(config)
    for name in (f"{step.name}_head", f"{step.name}_embeddings"):
        before = next((known[name] for known in settings if name in known), None)
        if before != now[name]:
            raise ValueError(
                f"config.{step.name}.scores='{c.scores}' has scores of another "
                f"{name.rpartition('_')[2]} than config.{step.name} names; filter into a folder "
                "with these first, and name that folder"
            )


def _recorded_settings(folder: str) -> list[dict[str, Any]]:
    return [
        files.read_object(files.join(folder, *below, filter_config.SETTINGS)) or {}
        for below in (("parts",), ())
    ]


def _check_model(config: ml_collections.ConfigDict, scored_by: str) -> None:
    """Refuses the scores of another model than `config.clip.model`.

    A model is known by its files; where they are not here, or were not recorded, by its name.
    """
    c = config.clip
    settings = _recorded_settings(c.scores)
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


def run(folder: str, config: ml_collections.ConfigDict | None, to: str | None) -> Result:
    """Replays a folder and prints what comes of it.

    Args:
        folder: finished output of the filter.
        config: by which the pairs are decided; None for that of the folder.
        to: folder of the lists; None writes none.
    """
    result = Replay(folder, config).run(to)
    print_escaped(result.format_table())
    return result


def _restore_config(settings: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config by which a folder was filtered; keys that it did not record have defaults."""
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
