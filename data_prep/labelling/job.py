"""A whole labelling job: embeddings of all shards, the two heads, the labels, the report.

The folder of the output:

    embeddings/             the teacher's embeddings of every shard, one npz each
    vocabulary_*.tsv        the concepts and their ids
    heads.npz, heads.json   the trained heads, their curves and metrics
    labels/, labels.json    the labels of every shard, one npz each (`diht_jax.records.labels`)
    clip_embeddings/, clip_embeddings.json      with `config.clip_teachers.models`: likewise
    stats.json, report.html, curves.png

With `config.merge`, instead of `labels/` and `labels.json`:

    *.tfrecord              the input's records with concepts, and their statistics; or
                            *.array_record, as config.output_format has it
    dataset.index           where the records of all shards lie (`diht_jax.data.index`)
    dataset_info.json, features.json

Every stage does only what is not done yet. The input is read once: the shards that new heads learn
from for the embeddings, and each of the others for embeddings and labels in one pass. To be merged,
the records of the former are read again, from a copy where there is room for it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.crash_search import after_death
from data_prep.jobs.engine import RaySettings, engine_options, print_failures
from data_prep.jobs.failures import (
    Failures,
    is_unfinished,
    run_noting_failures,
    survey,
    with_output,
)
from data_prep.jobs.shards import FAILED_SUFFIX
from data_prep.labelling import clip_embeddings, embeddings, plan, summary, unchanged
from data_prep.labelling import shard as label_shard
from data_prep.labelling.obtain_heads import obtain_heads, plan_heads, use_trained
from data_prep.labelling.scratch import Scratch, open_scratch
from data_prep.sources import list as source_list
from data_prep.teachers.base import Teacher, TeacherInfo
from data_prep.teachers.clip import load_clip_teachers
from data_prep.teachers.registry import load_teacher
from diht_jax.readers.registry import SourceShard
from diht_jax.records.labels.clip_embeddings import CLIP_EMBEDDINGS
from diht_jax.storage import files, locks


def run(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
) -> Failures:
    """Does what is not done yet: embeds, trains the heads, labels, and writes the report.

    Args:
        config: a valid one of `labelling.config.default_config`.
        task_index: number of this job of a job array.
        num_tasks: jobs that share the work.
        engine: one of `engine.ENGINES`.

    Returns:
        Shards that failed, with the reason.

    Raises:
        ValueError: nothing to read, nowhere to write, no concept, or a teacher that is missing.
    """
    inputs = plan.find_inputs(config.input)
    folder = source_list.check_output(config.output, inputs)
    files.make_folder(folder)
    share = functools.partial(
        source_list.shards_of_task, task_index=task_index, num_tasks=num_tasks
    )
    failures, is_complete = Failures(), True
    if config.clip_teachers.models:
        failures, is_complete = _embed_clips(config, inputs, folder, share, engine)
    if not config.concepts or not is_complete:
        return print_failures(failures)
    # What is merged lies in the input, which is read again where the heads have learnt from it.
    again = [inputs[0].path] if config.merge and engine == "local" else []
    with open_scratch(config, folder, *again) as scratch:
        return _label(config, inputs, folder, share, engine, failures, scratch)


def _label(
    config: ml_collections.ConfigDict,
    inputs: Sequence[SourceShard],
    folder: str,
    share: Callable[[Sequence[Any]], Sequence[Any]],
    engine: str,
    failures: Failures,
    scratch: Scratch | None,
) -> Failures:
    """The concept labels; arguments and result as of `run`, with this job's share of tasks."""
    config, teacher = plan.settle(config, folder)
    load = functools.partial(load_teacher, config.teacher)
    stage = _Stage(config, engine, teacher, load, scratch)
    tasks = plan.plan_shards(config, inputs, folder)
    embedding_tasks = embeddings.plan_embeddings(
        tasks, teacher.identity, config.embedding_dtype, plan.identify_shards(tasks)
    )
    unchanged.keep_touched(embedding_tasks, "embeddings")
    heads_plan = plan_heads(config, folder, embedding_tasks)
    # Merged shards are numbered, so that none may be missing.
    limit = 0 if config.merge else config.max_failed_shards
    first = heads_plan.sample
    failures |= stage.embed(share(first))
    embedded = survey(first)
    if first:
        if is_unfinished(limit, embedded, len(tasks), "embedded"):
            return print_failures(failures)
        _check_embedded(config, [task for task, _ in embedded.parts])
    failed = [row["source"] for row in embedded.failed]
    with contextlib.nullcontext() if heads_plan.kept else locks.leader_lock(folder):
        if heads_plan.kept is None:
            # One job makes them; others that come meanwhile wait, and label with what it has made.
            heads_plan = use_trained(config, folder, heads_plan, embedding_tasks)
        heads = obtain_heads(config, folder, heads_plan, embedding_tasks, failed, teacher, scratch)
    tasks = plan.plan_labels(config, tasks, heads, embedding_tasks)
    if not config.merge:
        unchanged.keep_touched(tasks, "labels")
    embedding_of = {
        task.output: embedding for task, embedding in zip(tasks, embedding_tasks, strict=True)
    }
    _note_failed(tasks, embedded.failed)
    vocabulary = heads_plan.vocabulary
    labelled, has_begun = stage.label(
        share([task for task in tasks if str(task.source) not in failed]),
        functools.partial(summary.remove_summary, folder),
        heads_folder=folder,
        weights_hash=heads["weights_hash"],
        top_k=config.top_k,
        described=vocabulary.describe(),
    )
    failures |= labelled
    with locks.leader_lock(folder):
        found = survey(tasks)
        if is_unfinished(limit, found, len(tasks), "labelled"):
            return print_failures(failures)
        if has_begun and files.exists(files.join(folder, shards.MERGED_STATS)):
            print(f"{folder}: another job has described the labels")
        else:
            if not first:
                _check_embedded(config, [embedding_of[task.output] for task, _ in found.parts])
            summary.summarize(config, found, embedding_of, folder, vocabulary, heads, teacher)
            for made in (embedding_tasks,) if config.merge else (tasks, embedding_tasks):
                unchanged.remove_gone(made, config.max_changed_shards)
    return print_failures(with_output(failures, found.failed))


def _embed_clips(
    config: ml_collections.ConfigDict,
    inputs: Sequence[SourceShard],
    folder: str,
    share: Callable[[Sequence[Any]], Sequence[Any]],
    engine: str,
) -> tuple[Failures, bool]:
    """Embeddings of the CLIP teachers; what failed, and whether those of all shards are there."""
    load = functools.partial(load_clip_teachers, config.clip_teachers)
    teachers = load()
    tasks = clip_embeddings.plan_tasks(
        plan.plan_shards(config, inputs, folder), folder, teachers.manifest
    )
    unchanged.keep_touched(tasks, "embeddings by CLIPs")
    pending = _unfinished(share(tasks), "embed by CLIPs")
    if pending:
        files.remove(files.join(folder, CLIP_EMBEDDINGS.manifest))
    function = functools.partial(
        clip_embeddings.embed_shard, teachers=config.clip_teachers, manifest=teachers.manifest
    )
    stage = _Stage(config, engine, teachers.info, load)
    failures = stage.run(function, pending, "embed by CLIPs")
    found = survey(tasks)
    if is_unfinished(config.max_failed_shards, found, len(tasks), "embedded by CLIPs"):
        return failures, False
    clip_embeddings.write_manifest(found, folder, teachers.manifest)
    unchanged.remove_gone(tasks, config.max_changed_shards)
    return with_output(failures, found.failed), True


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Where and how the tasks of a stage run."""

    config: ml_collections.ConfigDict
    engine: str
    teacher: TeacherInfo
    load: Callable[[], Teacher]
    scratch: Scratch | None = None

    def embed(self, tasks: Sequence[shards.ShardTask]) -> Failures:
        """Computes the embeddings that are missing; returns what failed."""
        pending = _unfinished(tasks, "embed")
        settings = {"teacher": self.config.teacher, "dtype": self.config.embedding_dtype}
        if self.engine == "local" or self.scratch is None:
            function = functools.partial(
                embeddings.embed_shard,
                scratch=self.scratch,
                keeps_records=self.config.merge,
                **settings,
            )
            return self.run(function, pending, "embed")
        function = functools.partial(embeddings.embed_for_driver, **settings)
        return self.run(function, pending, "embed", on_result=self._keep)

    def _keep(self, written: Sequence[tuple[str, bytes]]) -> None:
        for path, data in written:
            self.scratch.keep(path, data)

    def label(
        self, tasks: Sequence[shards.ShardTask], prepare: Callable[[], None], **heads: Any
    ) -> tuple[Failures, bool]:
        """Labels the shards that are not labelled yet; what failed, and whether there were any.

        Args:
            tasks: of `plan.plan_labels`.
            prepare: called before a shard changes.
            **heads: arguments of `shard.write_labels`.
        """
        pending = _unfinished(tasks, "label")
        if pending:
            prepare()
        there = shards.find_finished([task.embedding for task in pending])
        seen, unseen, here = [], [], []
        for task in pending:
            (seen if task.embedding.output in there else unseen).append(task)
        of_embedded, of_others = label_shard.write_labels, label_shard.embed_and_label
        if self.config.merge:
            of_embedded, of_others = label_shard.label_shard, label_shard.embed_and_merge
        elif self.engine != "local" and self.scratch is not None:
            # Whose embeddings lie on this machine is labelled on it: it costs less than to train
            # the heads has cost here.
            here = [task for task in seen if self.scratch.has(task.embedding.output)]
            seen = [task for task in seen if not self.scratch.has(task.embedding.output)]
        function = functools.partial(of_embedded, scratch=self.scratch, **heads)
        on_this_machine = dataclasses.replace(self, engine="local")
        failures = on_this_machine.run(function, here, "label", is_light=True)
        scratch = self.scratch if self.engine == "local" else None
        function = functools.partial(of_embedded, scratch=scratch, **heads)
        failures.update(self.run(function, seen, "label", is_light=True))
        function = functools.partial(
            of_others,
            teacher=self.config.teacher,
            dtype=self.config.embedding_dtype,
            **heads,
        )
        failures.update(self.run(function, unseen, "embed and label"))
        return failures, bool(pending)

    def run(
        self,
        function: Callable[..., Any],
        pending: Sequence[shards.ShardTask],
        label: str,
        *,
        is_light: bool = False,
        on_result: Callable[[Any], None] = lambda _: None,
    ) -> Failures:
        """Runs tasks; what fails is noted beside their outputs.

        Args:
            function: of a task and its report.
            pending: of this job.
            label: of the progress bar.
            is_light: whether no teacher is needed.
            on_result: called here with what the function returns of a task.
        """
        options = engine_options(self.config, self.engine)
        options |= {"label": label, "on_result": on_result}
        if is_light:
            if options["ray"] is not None:
                address, cpus = options["ray"].address, options["ray"].cpus_per_worker
                options["ray"] = RaySettings(address, cpus or 1.0)
            return run_noting_failures(function, pending, options)
        options["after_death"] = after_death
        if self.teacher.in_this_process and options["ray"] is None:
            # A process that can be stopped must be another one than this.
            is_limited = self.config.shard_timeout_secs is not None
            options["num_workers"] = int(is_limited and self.config.num_workers != 0)
            if pending and not is_limited:
                self.load()  # an error in it is raised once, not by shard
        return run_noting_failures(function, pending, options)


def _note_failed(tasks: Iterable[shards.ShardTask], failed: Collection[dict[str, str]]) -> None:
    """Notes beside the labels which shards could not be embedded."""
    notes = {note["source"]: note for note in failed}
    for task in tasks:
        note = notes.get(str(task.source))
        if note is not None:
            files.remove(task.stats_path)
            shards.write_json(task.output + FAILED_SUFFIX, note)


def _check_embedded(config: ml_collections.ConfigDict, tasks: Sequence[shards.ShardTask]) -> None:
    """Raises ValueError where no record at all has an embedding."""
    counts = [stats["counts"] for _, stats, _ in shards.check_all(tasks) if stats is not None]
    reasons = collections.Counter()
    for count in counts:
        reasons.update(count["missing"])
    if any(count["embedded"] for count in counts) or not reasons:
        return
    theirs = load_teacher(config.teacher).example_keys()
    if not theirs:
        described = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
        raise ValueError(f"none of {reasons.total():,} images has an embedding ({described})")
    records = itertools.chain.from_iterable(embeddings.read_shard(task.source) for task in tasks)
    yours = [record.key for record in itertools.islice(records, 2)]
    raise ValueError(
        f"0 of {reasons.total():,} keys found in config.teacher.{config.teacher.kind}; theirs look "
        f"like {_quoted(theirs)}, yours like {_quoted(yours)}"
    )


def _quoted(keys: Sequence[str]) -> str:
    return ", ".join(f"{key!r:.80}" for key in keys)


def _unfinished(tasks: Sequence[shards.ShardTask], label: str) -> list[shards.ShardTask]:
    done = shards.find_finished(tasks)
    logging.info("%s: %d shards, %d of them done before", label, len(tasks), len(done))
    return [task for task in tasks if task.output not in done]
