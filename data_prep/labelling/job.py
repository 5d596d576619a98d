"""A whole labelling job: embeddings of all shards, the two heads, the labels, the report.

The folder of the output:

    embeddings/             the teacher's embeddings of every shard, one npz each
    vocabulary_*.tsv        the concepts and their ids
    heads.npz, heads.json   the trained heads, their curves and metrics
    labels/, labels.json    the labels of every shard, one npz each (`diht_jax.data.records.labels`)
    stats.json, report.html, curves.png

With `config.merge`, instead of `labels/` and `labels.json`:

    *.tfrecord              the input's records with concepts, and their statistics; or
                            *.array_record, as config.output_format has it
    dataset.index           where the records of all shards lie (`diht_jax.data.index`)
    dataset_info.json, features.json

Every stage does only what is not done yet. The input is read once, for the embeddings; merged
shards read it again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import files, shards
from data_prep.jobs.engine import RaySettings, print_failures, run_pending
from data_prep.labelling import embeddings, plan, summary
from data_prep.labelling import heads as head_files
from data_prep.labelling import shard as label_shard
from data_prep.labelling import vocabulary as concept_vocabulary
from data_prep.labelling.examples import gather_examples, warn_of_few_mentions
from data_prep.sources import list as source_list
from data_prep.teachers.base import TeacherInfo
from data_prep.teachers.registry import load_teacher
from diht_jax.data.records.vocabulary import (
    Vocabulary,
    encode_concepts,
    read_vocabulary,
    vocabulary_path,
)

_HEADS_VERSION = 1


def run(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
) -> dict[str, str]:
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
    config, teacher = plan.settle(config, folder)
    vocabulary = _make_vocabulary(config, [source.path for source in inputs])
    tasks = plan.plan_shards(config, inputs, folder)
    embedding_tasks = embeddings.plan_embeddings(tasks, teacher.identity, config.embedding_dtype)
    share = functools.partial(
        source_list.shards_of_task, task_index=task_index, num_tasks=num_tasks
    )
    stage = _Stage(config, engine)
    failures = _embed(stage, teacher, share(embedding_tasks))
    if not _all_done(embedding_tasks, "embedded"):
        return failures
    _check_embedded(config, embedding_tasks)
    for part in vocabulary:
        files.write_bytes(vocabulary_path(folder, part.kind), encode_concepts(part))
    heads = _obtain_heads(config, folder, vocabulary, embedding_tasks, teacher)
    tasks = plan.plan_labels(config, tasks, heads, embedding_tasks)
    label = functools.partial(
        label_shard.label_shard if config.merge else label_shard.write_labels,
        heads_folder=folder,
        weights_hash=heads["weights_hash"],
        top_k=config.top_k,
        described=vocabulary.describe(),
    )
    if _unfinished(share(tasks)):
        summary.remove_summary(folder)
    failures = stage.run(label, share(tasks), "label", is_light=True)
    if _all_done(tasks, "labelled"):
        summary.summarize(config, tasks, embedding_tasks, folder, vocabulary, heads, teacher)
    return failures


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Where the tasks of a stage run."""

    config: ml_collections.ConfigDict
    engine: str

    @property
    def ray(self) -> RaySettings | None:
        """The settings of the cluster; None for local processes."""
        return RaySettings(**self.config.ray.to_dict()) if self.engine == "ray" else None

    def run(
        self,
        function: Callable[..., Any],
        tasks: Sequence[shards.ShardTask],
        label: str,
        *,
        in_this_process: bool = False,
        is_light: bool = False,
    ) -> dict[str, str]:
        """Runs the tasks that are not done, and prints what failed.

        Args:
            function: of a task and its report.
            tasks: of this job.
            label: of the progress bar.
            in_this_process: whether it takes all of this machine; on a cluster, an actor does.
            is_light: whether it needs no GPU.
        """
        pending, ray = _unfinished(tasks), self.ray
        done = len(tasks) - len(pending)
        logging.info("%s: %d shards, %d of them done before", label, len(tasks), done)
        if ray is not None and is_light:
            ray = RaySettings(ray.address, ray.cpus_per_worker or 1.0)
        num_workers = 0 if in_this_process and ray is None else self.config.num_workers
        return print_failures(
            run_pending(
                function,
                pending,
                num_workers=num_workers,
                label=label,
                retries=self.config.retries,
                timeout_secs=self.config.shard_timeout_secs,
                ray=ray,
            )
        )


def _make_vocabulary(config: ml_collections.ConfigDict, paths: Sequence[str]) -> Vocabulary:
    if config.heads.load:
        return read_vocabulary(config.heads.load)
    settings = config.vocabulary
    vocabulary = concept_vocabulary.build_vocabulary(
        concept_vocabulary.merge_counts(paths),
        min_count=settings.min_count,
        stop={"objects": settings.stop_objects, "attributes": settings.stop_attributes},
        max_size={"objects": settings.max_objects, "attributes": settings.max_attributes},
    )
    logging.info("%d objects, %d attributes", *map(len, vocabulary))
    return vocabulary


def _obtain_heads(
    config: ml_collections.ConfigDict,
    folder: str,
    vocabulary: Vocabulary,
    embedded: Sequence[shards.ShardTask],
    teacher: TeacherInfo,
) -> dict[str, Any]:
    """Heads and description of a folder: those that are there, loaded ones, or newly trained ones.

    Args:
        config: of `labelling.config.default_config`.
        folder: gets `heads.npz` and `heads.json`.
        vocabulary: v of each head.
        embedded: finished tasks of `embeddings.plan_embeddings`.
        teacher: whose embeddings they are.

    Returns:
        The description, as `heads.json` has it.
    """
    settings = {
        "format_version": _HEADS_VERSION,
        "heads": config.heads.to_dict(),
        "seed": config.seed,
        "vocabulary": vocabulary.describe(),
        "embeddings": [[task.config_hash, task.source.identity()] for task in embedded],
    }
    config_hash = shards.hash_config(settings)
    description = head_files.read_description(folder)
    present = {"config_hash": config_hash, "weights_hash": head_files.hash_heads(folder)}
    if description is not None and present.items() <= description.items():
        logging.info("heads: trained before")
        return description
    heads, results = {}, {}
    if config.heads.load:
        heads = head_files.load_heads(config.heads.load)
        results = head_files.load_results(config.heads.load, teacher)
    else:
        # It needs JAX, which no worker should wait for: workers import this module as well.
        from data_prep.labelling.train_heads import train_and_measure

        train, held_out = gather_examples(config, vocabulary, embedded)
        warn_of_few_mentions(train, held_out)
        for part in vocabulary:
            if len(part):
                heads[part.kind], results[part.kind] = train_and_measure(
                    config, part, train, held_out
                )
    head_files.write_heads(folder, heads)
    description = {
        "config_hash": config_hash,
        "weights_hash": head_files.hash_heads(folder),
        "loaded_from": config.heads.load,
        "vocabulary": vocabulary.describe(),
        "teacher": dict(teacher.identity),
        "heads": results,
    }
    shards.write_json(files.join(folder, head_files.DESCRIPTION), description)
    return description


def _embed(
    stage: _Stage, teacher: TeacherInfo, tasks: Sequence[shards.ShardTask]
) -> dict[str, str]:
    """Computes the embeddings that are missing; returns failures with the reason."""
    config = stage.config
    if teacher.in_this_process and stage.ray is None and _unfinished(tasks):
        load_teacher(config.teacher)  # an error in it is raised once here, not for every shard
    embed = functools.partial(
        embeddings.embed_shard, teacher=config.teacher, dtype=config.embedding_dtype
    )
    return stage.run(embed, tasks, "embed", in_this_process=teacher.in_this_process)


def _check_embedded(config: ml_collections.ConfigDict, tasks: Sequence[shards.ShardTask]) -> None:
    """Raises ValueError where no record at all has an embedding."""
    counts = [shards.load_finished(task)["counts"] for task in tasks]
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


def _unfinished(tasks: Sequence[shards.ShardTask]) -> list[shards.ShardTask]:
    return [task for task in tasks if shards.load_finished(task) is None]


def _all_done(tasks: Sequence[shards.ShardTask], participle: str) -> bool:
    done = sum(shards.load_finished(task) is not None for task in tasks)
    if done < len(tasks):
        print(
            f"{done} of {len(tasks)} shards are {participle}; run the command again, or wait for "
            "the other jobs"
        )
    return done == len(tasks)
