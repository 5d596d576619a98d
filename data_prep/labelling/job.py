"""Labelling job: computes embeddings, trains two heads, and writes labels and a report.

The output folder contains:

    embeddings/             embeddings of the teacher for every shard
    vocabulary_*.tsv        the concepts and their ids
    heads.npz, heads.json   the trained heads, their curves and metrics
    labels/                 labels of every shard (`diht_jax.records.labels`)
    clip_embeddings/        embeddings of `config.clip_teachers.models`, if set
    stats.json, report.html, curves.png

With `config.merge`, it has these files instead of `labels/`:

    *.tfrecord              records of the input with concepts, and their statistics; or
                            *.array_record, as set by config.output_format
    dataset.index           offsets of the records in all shards (`diht_jax.data.index`)
    dataset_info.json, features.json

Every stage skips finished work. The input is read once: shards selected for training the heads are
read to embed them, and all others to embed and label them in one pass. Merging reads the former
shards again, from a local copy if there is space for it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep import sources
from data_prep.jobs import shards
from data_prep.jobs.engine import print_failures
from data_prep.jobs.failures import (
    FAILED_SUFFIX,
    Failures,
    find_finished,
    is_unfinished,
    run_noting_failures,
    survey,
    with_output,
)
from data_prep.labelling import config as label_config
from data_prep.labelling import embeddings, labels, summary, tasks
from data_prep.labelling.embeddings import LocalCopies
from data_prep.labelling.heads import Heads
from data_prep.labelling.tasks import LabelTask
from data_prep.teachers.base import Teacher, TeacherInfo
from data_prep.teachers.clip import load_clip_teachers
from data_prep.teachers.registry import describe_teacher, load_teacher
from diht_jax.config.checks import validate_config
from diht_jax.readers.registry import SourceShard
from diht_jax.records.dataset_index import INDEX_NAME
from diht_jax.records.labels.shards import CLIP_EMBEDDINGS, ShardIdentity
from diht_jax.records.shard_files import kind_of
from diht_jax.records.train_data import LABELS
from diht_jax.storage import files, locks
from diht_jax.terminal import print_escaped

_GB = 10**9
_LABELS_VERSION = 3
_CLIPS_VERSION = 3


def run_label(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
) -> Failures:
    """Runs all unfinished stages: embeds, trains the heads, labels, and writes the report.

    Returns:
        Failed shards with the reason, and whether the labels were written without them; the other
        shards are complete.

    Raises:
        ValueError: the config is wrong, the input is missing, the output cannot be written, no
            concept was found, or a teacher is missing.
    """
    validate_config(config, label_config.default_config())
    label_config.check_config(config)
    inputs = tasks.find_inputs(config.input)
    config = config.copy_and_resolve_references()
    config.output = sources.check_folder(config.output)
    sources.check_not_input(config.output, inputs)
    files.make_folder(config.output)
    if not config.merge and any(map(kind_of, files.list_names(config.output))):
        logging.info("%s holds merged shards: config.merge=True", config.output)
        config.merge = True
    share = slice(task_index, None, num_tasks)
    job = _Job(config, engine, inputs, tasks.identify_inputs(inputs), share)
    teacher = describe_teacher(config.teacher) if config.concepts else None
    failures, is_complete = Failures(), True
    if config.clip_teachers.models:
        failures, is_complete = job.embed_by_clips()
    if teacher and is_complete:
        max_bytes = config.scratch_gb * _GB
        with LocalCopies.open(max_bytes, with_records=config.merge) as copies:
            if engine != "local":  # workers of a cluster do not share a disk
                copies = embeddings.NO_COPIES
            failures = job.label(failures, teacher, copies)
    return print_failures(failures)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A labelling job on the shards of an input."""

    config: ml_collections.ConfigDict
    engine: str
    inputs: Sequence[SourceShard]
    identities: Sequence[ShardIdentity | None]
    share: slice  # selects the tasks of this job of a job array, in each stage

    def label(self, failures: Failures, teacher: TeacherInfo, copies: LocalCopies) -> Failures:
        """Makes the concept labels; returns the earlier failures together with new ones."""
        config, folder = self.config, self.config.output
        failures = Failures(failures)  # resets `output_written`
        embeddings_hash = embeddings.hash_embeddings(teacher.identity, config.embedding_dtype)
        embedding_tasks = self._plan(embeddings.FOLDER, embeddings_hash)
        heads = Heads(config, embedding_tasks, embeddings_hash)
        # Merged shards are numbered consecutively, so none may be missing.
        limit, total = 0 if config.merge else config.max_failed_shards, len(self.inputs)
        function = functools.partial(embeddings.embed_shard, config=config, copies=copies)
        pending = _unfinished(heads.sample[self.share], "embed")
        failures |= self._run(function, pending, "embed", teacher)
        embedded = survey(heads.sample)
        if heads.sample:
            if is_unfinished(limit, embedded, total, "embedded"):
                return failures
            _check_embedded(config, [task for task, _ in embedded.parts])
        failed = {note["source"]: note for note in embedded.failed}
        described = heads.obtain(failed, teacher, copies, _train_head)
        planned = self._plan_labels(described, embeddings_hash, embedding_tasks)
        for task in planned:
            if note := failed.get(str(task.source)):  # its embedding failed
                files.remove(task.stats_path)
                files.write_object(task.output + FAILED_SUFFIX, note)
        wanted = [task for task in planned if str(task.source) not in failed]
        pending = _unfinished(wanted[self.share], "label")
        failures |= self._label(pending, described, teacher, copies)
        with locks.leader_lock(folder):
            found = survey(planned)
            if is_unfinished(limit, found, total, "labelled"):
                return failures
            if pending and files.exists(files.join(folder, shards.MERGED_STATS)):
                print_escaped(f"{folder}: another job has described the labels")
            else:
                tasks.refuse_changed(self.inputs, self.identities)
                if not heads.sample:
                    _check_embedded(config, [task.embedding for task, _ in found.parts])
                # Numbered shards match the current inputs.
                for each in (embedding_tasks,) if config.merge else (planned, embedding_tasks):
                    tasks.remove_gone(each, config.max_changed_shards)
                summary.summarize(config, found, heads.vocabulary, described, teacher)
        return with_output(failures, found.failed)

    def embed_by_clips(self) -> tuple[Failures, bool]:
        """Embeds all shards with CLIP teachers; returns failures, and whether it is complete."""
        config = self.config
        load = functools.partial(load_clip_teachers, config.clip_teachers)
        teachers = load()
        facts = teachers.facts
        settings = {"format_version": _CLIPS_VERSION, "dtype": facts.dtype, **facts.meaning}
        planned = self._plan(CLIP_EMBEDDINGS, shards.hash_config(settings))
        pending = _unfinished(planned[self.share], "embed by CLIPs")
        if pending:
            files.remove(files.join(config.output, CLIP_EMBEDDINGS, INDEX_NAME))
        function = functools.partial(
            labels.embed_by_clips, teachers=config.clip_teachers, facts=facts
        )
        failures = self._run(function, pending, "embed by CLIPs", teachers.info, load)
        found = survey(planned)
        if is_unfinished(config.max_failed_shards, found, len(planned), "embedded by CLIPs"):
            return failures, False
        tasks.remove_gone(planned, config.max_changed_shards)
        summary.summarize_clips(config, found, facts)
        return with_output(failures, found.failed), True

    def _plan(self, name: str, settings_hash: str) -> list[LabelTask]:
        folder = files.join(self.config.output, name)
        return tasks.plan_outputs(self.inputs, folder, settings_hash, self.identities)

    def _plan_labels(
        self, heads: dict[str, Any], embeddings_hash: str, embedding_tasks: Sequence[LabelTask]
    ) -> list[LabelTask]:
        """Returns the labelling task of every shard; `heads` has the contents of `heads.json`."""
        config = self.config
        settings_hash = shards.hash_config(
            {
                "format_version": _LABELS_VERSION,
                "embeddings": embeddings_hash,
                "heads": heads["weights_hash"],
                "vocabulary": heads["vocabulary"],
                "top_k": config.top_k,
            }
        )
        if config.merge:
            planned = tasks.plan_outputs(
                self.inputs, config.output, settings_hash, self.identities, config
            )
        else:
            planned = self._plan(LABELS, settings_hash)
        return [
            dataclasses.replace(task, embeddings=made)
            for task, made in zip(planned, embedding_tasks, strict=True)
        ]

    def _label(
        self,
        pending: Sequence[LabelTask],
        described: dict[str, Any],
        teacher: TeacherInfo,
        copies: LocalCopies,
    ) -> Failures:
        """Labels shards, after embedding them if necessary; returns the failures."""
        if pending:
            # Remove the files that describe the whole folder before a shard changes.
            shards.remove_merged(self.config.output)
            files.remove(files.join(self.config.output, LABELS, INDEX_NAME))
        there = find_finished([task.embedding for task in pending])
        seen = [task for task in pending if task.embedding.output in there]
        unseen = [task for task in pending if task.embedding.output not in there]
        heads = {name: described[name] for name in ("weights_hash", "vocabulary")}
        options = {"config": self.config, "heads": heads}
        function = functools.partial(labels.label_shard, **options, copies=copies)
        failures = self._run(function, seen, "label")
        function = functools.partial(labels.embed_and_label, **options)
        failures |= self._run(function, unseen, "embed and label", teacher)
        return failures

    def _run(
        self,
        function: Callable[..., Any],
        pending: Sequence[LabelTask],
        label: str,
        teacher: TeacherInfo | None = None,
        load: Callable[[], Teacher] | None = None,
    ) -> Failures:
        """Runs tasks; records failures next to their outputs.

        `teacher` is the teacher that the function uses, if any; `load` loads it (`load_teacher`).
        """
        config = self.config.copy_and_resolve_references()
        if teacher is None:  # without a network, workers need no GPU
            own = {"cpus_per_worker": config.ray.cpus_per_worker or 1.0, "gpus_per_worker": 0.0}
            config.ray.update(own, model_actors=0)
        elif teacher.in_this_process and self.engine == "local":
            # Only a separate process can be stopped at a time limit.
            is_limited = config.shard_timeout_secs is not None
            config.num_workers = int(is_limited)
            if pending and not is_limited:  # fails once instead of once per shard
                load() if load else load_teacher(config.teacher)
        return run_noting_failures(function, pending, config, self.engine, label=label)


def _train_head(*arguments: Any) -> Any:
    # Imported here because only training needs JAX, which is slow to import.
    from data_prep.labelling.train_heads import train_and_measure

    return train_and_measure(*arguments)


def _unfinished(planned: Sequence[LabelTask], label: str) -> list[LabelTask]:
    done = find_finished(planned)
    logging.info("%s: %d shards, %d of them done before", label, len(planned), len(done))
    return [task for task in planned if task.output not in done]


def _check_embedded(config: ml_collections.ConfigDict, planned: Sequence[LabelTask]) -> None:
    """Raises ValueError if no record has an embedding."""
    counts = [stats["counts"] for _, stats, _ in shards.check_all(planned) if stats is not None]
    reasons = sum(
        (collections.Counter(count["missing"]) for count in counts), collections.Counter()
    )
    if any(count["embedded"] for count in counts) or not reasons:
        return
    theirs = load_teacher(config.teacher).example_keys()
    if not theirs:
        described = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
        raise ValueError(f"none of {reasons.total():,} images has an embedding ({described})")
    records = itertools.chain.from_iterable(embeddings.read_shard(task.source) for task in planned)
    yours = [record.key for record in itertools.islice(records, 2)]
    raise ValueError(
        f"0 of {reasons.total():,} keys found in config.teacher.{config.teacher.kind}; theirs look "
        f"like {_quoted(theirs)}, yours like {_quoted(yours)}"
    )


def _quoted(keys: Collection[str]) -> str:
    return ", ".join(f"{key!r:.80}" for key in keys)
